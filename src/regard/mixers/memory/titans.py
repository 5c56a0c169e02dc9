"""Titans: a long-term memory that learns at test time, alone, and beside attention as its context, its gate or a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, RMSNorm, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.memory._neural_memory import CHUNK
from regard.mixers.memory.aligned import Aligned
from regard.mixers.memory.choices import Design, Memory
from regard.mixers.memory.miras import OfDesign
from regard.mixers.memory.network import recall
from regard.mixers.mixer import Facts, Mixer, check_divides, join_heads, split_heads
from regard.mixers.rotary import check_rotary
from regard.mixers.softmax.prefixed_attention import PrefixedWindow, prefixed_attention

_PAPER = "A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time"


class LongTermMemory(OfDesign):
    """The neural memory of Titans, alone: ``S_t = η_t S_{t−1} − θ_t ∇ℓ(M; k_t, v_t), M_t = (1 − α_t) M_{t−1} + S_t``.

    ``ℓ = ‖M(k) − v‖² / 2``. Of `Miras`' choices: ℓ₂ bias and retention, gradient descent with momentum. The first version of
    the paper has gates of one number for each token, which are each head's here; the later one has them for each channel.

    Args:
        dim: of the tokens.
        heads: that divide it, each with a memory; the paper does not say how many.
        memory: a network of two matrices by default, ``Memory(depth=1)`` for a matrix.
        chunk, largest_step, convolution: as in `Miras`.

    A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time.

    >>> import torch
    >>> mixer = LongTermMemory(32, heads=4)
    >>> y, state = mixer(torch.randn(2, 20, 32))
    >>> y.shape, state.tensors["surprise0"].shape
    (torch.Size([2, 20, 32]), torch.Size([2, 4, 32, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t−1}; k_t, v_t),  M_t = (1 − α_t) M_{t−1} + S_t,  o_t = M_t(q_t)",
        time="O(8 N D²/H)",
        state="24 D²/H + 3 (K − 1) D",
    )

    choices = Design(momentum=True)


class _Titan(Mixer):
    """What the three variants share: a memory, attention after learned tokens, and how one gates the other."""

    def __init__(
        self, dim: int, heads: int = 4, window: int = 64, *, persistent: int = 4, memory: Memory | None = None,
        chunk: int = CHUNK, largest_step: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dim)
        name = type(self).__name__
        check_divides(name, dim, heads)
        check_rotary(name, dim, heads)
        if window < 1 or persistent < 1:
            raise ValueError(
                f"{name}: attention must reach at least 1 token, and there must be at least 1 persistent one, got "
                f"{window} and {persistent}"
            )
        self.heads = heads
        self.persistent = Parameter(torch.randn(persistent, dim) * dim**-0.5)
        self.memory = LongTermMemory(dim, heads, memory=memory, chunk=chunk, largest_step=largest_step)
        self.attention = PrefixedWindow(dim, heads, window)

    def system(self, x: Tensor) -> DynamicalSystem:
        """There is none, whatever the memory."""
        raise NotImplementedError(
            f"{type(self).__name__} is no linear dynamical system: its memory and its attention have values of their own, "
            "and one is given, or multiplied by, what the other gives; its `memory` alone is one where it is a matrix"
        )

    def _persistent(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the memory gives for the persistent tokens, (P, dim), and its state for each text once it has read them."""
        first, begun = self.memory.mix(self.persistent[None], None, PLAIN)
        return first[0], {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in begun.items()}


class _Gate(torch.nn.Module):
    """``(norm(y) ∘ sigmoid(norm(m))) W``: the paper names two norms with learned weights and a non-linearity, not which."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.near, self.far = RMSNorm(dim, eps=1e-5), RMSNorm(dim, eps=1e-5)
        self.o_proj = Linear(dim, dim, bias=False)

    def forward(self, near: Tensor, far: Tensor) -> Tensor:
        y: Tensor = self.o_proj(self.near(near) * self.far(far).sigmoid())
        return y


class MemoryAsGate(_Titan):
    """Titans' MAG: ``o = norm(Attn(x)) ∘ σ(norm(M(x)))``, sliding-window attention gated by the memory.

    Persistent tokens come before all: the memory reads them first, attention always sees them. σ is the sigmoid and an
    output projection follows, neither of which the paper says.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        window: tokens that each sees, itself among them (2,048 in the paper).
        persistent: learned tokens before the text (128 in the paper).
        memory, chunk, largest_step: as in `LongTermMemory`.

    A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time.

    >>> import torch
    >>> mixer, x = MemoryAsGate(32, heads=4, window=8), torch.randn(2, 20, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, step.shape
    (torch.Size([2, 20, 32]), torch.Size([2, 32]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="o = (norm(SWA([P ‖ x])) ∘ σ(norm(M([P ‖ x])))) W",
        time="O(N (W + P) D + 8 N D²/H)",
        state="24 D²/H + (2 W + 3 K − 5) D",
    )

    def __init__(
        self, dim: int, heads: int = 4, window: int = 64, *, persistent: int = 4, memory: Memory | None = None,
        chunk: int = CHUNK, largest_step: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, window, persistent=persistent, memory=memory, chunk=chunk, largest_step=largest_step
        )
        self.gate = _Gate(dim)

    def mix(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend and remember, side by side."""
        begun = self._persistent(len(x))[1] if state is None else _of(state, "memory")
        far, memory = self.memory.mix(x, begun, layout)
        near, window = self.attention(x, self.persistent, None if state is None else _of(state, "window"), layout.mask)
        return self.gate(near, far), _named("memory", memory) | _named("window", window)


class MemoryAsLayer(_Titan):
    """Titans' MAL: ``o = Attn(x + M(x))``, sliding-window attention to what the memory gives.

    Persistent tokens come before all, for the memory, and as it leaves them for attention, which always sees them. The
    tokens are added to what the memory gives, as between the layers of a stack.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        window: tokens that each sees, itself among them (2,048 in the paper).
        persistent: learned tokens before the text (128 in the paper).
        memory, chunk, largest_step: as in `LongTermMemory`.

    A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time.

    >>> import torch
    >>> mixer = MemoryAsLayer(32, heads=4, window=8)
    >>> y, state = mixer(torch.randn(2, 20, 32))
    >>> y.shape, state.tensors["window.key"].shape
    (torch.Size([2, 20, 32]), torch.Size([2, 4, 7, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="y = x̃ + M(x̃),  o = SWA(y),  x̃ = [P ‖ x]",
        time="O(N (W + P) D + 8 N D²/H)",
        state="24 D²/H + (2 W + 3 K − 5) D",
    )

    def mix(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """Remember, then attend."""
        first, begun = self._persistent(len(x))
        far, memory = self.memory.mix(x, begun if state is None else _of(state, "memory"), layout)
        before = None if state is None else _of(state, "window")
        y, window = self.attention(x + far, self.persistent + first, before, layout.mask)
        return y, _named("memory", memory) | _named("window", window)


class MemoryAsContext(_Titan):
    """Titans' MAC: attention to a segment, to what the memory of earlier segments says of it, and to persistent tokens.

    For each segment x of C tokens, with M the memory before it: ``h_j = M(q(x_j))``, ``y = Attn([P ‖ h ‖ x])``, M is written
    with y, and ``o_i = norm(y_i) ∘ σ(norm(M_i(y_i)))``.

    Read literally, a token would see tokens after it, through the ``h`` of a whole segment before it and through a memory
    written with the whole segment. Here ``h_j`` is seen from position j on, and ``M_i`` is the memory written up to token i,
    so that the layer is causal and the same in pieces. The paper uses half as many memory tokens as a segment has, and does
    not say how; here there is one for each token. Its queries have a projection of their own, without convolution. σ is the
    sigmoid and an output projection follows.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        segment: C, its tokens (512 in the paper).
        persistent: learned tokens before each segment (128 in the paper).
        memory, chunk, largest_step: as in `LongTermMemory`.

    A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time.

    >>> import torch
    >>> mixer, x = MemoryAsContext(32, heads=4, segment=8), torch.randn(2, 20, 32)
    >>> whole, _ = mixer(x)
    >>> first, state = mixer(x[:, :13])  # in the middle of a segment
    >>> rest, _ = mixer(x[:, 13:], state)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-4))
    True
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="h = M(q(x)),  y = Attn([P ‖ h ‖ x]),  o_i = (norm(y_i) ∘ σ(norm(M_i(y_i)))) W, segment by segment",
        time="O(N (2C + P) D + 8 N D²/H)",
        state="32 D²/H + (4 C + 3 K − 3) D",
    )

    def __init__(
        self, dim: int, heads: int = 4, segment: int = 64, *, persistent: int = 4, memory: Memory | None = None,
        chunk: int = CHUNK, largest_step: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            dim, heads, segment, persistent=persistent, memory=memory, chunk=chunk, largest_step=largest_step
        )
        self.segment = segment
        self.q_proj = Linear(dim, dim, bias=False)
        self.recalled = RMSNorm(dim, eps=1e-5)
        self.gate = _Gate(dim)

    def mix(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """Segment after segment, each text's own beginning where those of all do."""
        now = self._begin(x) if state is None else dict(state)
        place = now.pop("place")
        mask = layout.mask
        aligned = Aligned(x[:, None], None if state is None else place, mask, self.segment)
        tokens = aligned.place(x[:, None])[:, 0]
        given = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        present = None if aligned.exact else aligned.place(given[:, None])
        low = aligned.first
        outputs = [x.new_zeros(len(x), low, self.dim)]
        for first in range(0, aligned.slots, self.segment):
            high = min(self.segment, aligned.last - first)
            part = slice(first + low, first + high)
            real = None if present is None else present[:, 0, part]
            output, now = self._attend(tokens[:, part], real, low, now)
            now = self._renew(now, aligned.filled(first + self.segment))
            outputs.append(output)
            low = 0
        y = aligned.take(torch.cat(outputs, dim=1)[:, None])[:, 0]
        return y, now | {"place": aligned.ends % self.segment}

    def _begin(self, x: Tensor) -> dict[str, Tensor]:
        """Before the first token: the memory that the layer has learned, and an empty segment."""
        batch = len(x)
        width = self.dim // self.heads
        empty = x.new_zeros(batch, self.heads, 2, self.segment, width)
        padding = torch.zeros(batch, 1, dtype=torch.bool, device=x.device)
        _, memory = self.memory.mix(torch.zeros_like(x[:, :1]), None, Layout(padding))
        place = torch.zeros(batch, dtype=torch.long, device=x.device)
        now = {"key": empty, "value": empty, "place": place} | _named("memory", memory)
        return now | self._written(now)

    def _written(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The memory as it is, which the next segment will read as the one before it."""
        depth = self.memory.design.memory.depth
        return {f"before.{layer}": now[f"memory.held{layer}"] for layer in range(depth)}

    def _renew(self, now: dict[str, Tensor], full: Tensor | bool) -> dict[str, Tensor]:
        """Where segments (B,) have ended: an empty one, and the memory as it is."""
        if full is False:
            return now
        fresh = {name: torch.zeros_like(now[name]) for name in ("key", "value")} | self._written(now)
        if full is True:
            return now | fresh
        return now | {
            name: torch.where(full.view(-1, *[1] * (tensor.ndim - 1)), tensor, now[name])
            for name, tensor in fresh.items()
        }

    def _attend(
        self, x: Tensor, real: Tensor | None, low: int, now: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens (B, n, dim) of a segment from its place ``low`` on, and what is known after them."""
        weights = [now[f"before.{layer}"] for layer in range(self.memory.design.memory.depth)]
        asked = functional.normalize(split_heads(self.q_proj(x), self.heads), dim=-1)
        recalled = self.recalled(join_heads(recall(asked.to(weights[0]), weights, self._gain()).to(x.dtype)))
        query, *own = self.attention.project(x)
        _, *far = self.attention.project(recalled)
        own[0], far[0] = self.attention.rotate(own[0], low), self.attention.rotate(far[0], low)
        high = low + x.shape[1]
        room = (0, 0, low, self.segment - high)
        pairs = [torch.stack(pair, 2) for pair in zip(far, own, strict=True)]
        if real is not None:
            pairs = [pair * real[:, None, None, :, None] for pair in pairs]
        key, value = (
            now[name] + functional.pad(pair, room) for name, pair in zip(("key", "value"), pairs, strict=True)
        )
        places = torch.arange(high, device=x.device)
        mixed = prefixed_attention(
            query, self.attention.rotate(query, low),
            key[:, :, :, :high].flatten(2, 3), value[:, :, :, :high].flatten(2, 3), self._prefix(),
            (places <= places[low:, None]).repeat(1, 2),
        )  # fmt: skip
        near: Tensor = self.attention.o_proj(join_heads(mixed))
        far_state = self.memory.state(_of(now, "memory"), 0, near.dtype)
        after, memory = self.memory(near, far_state, real)
        return self.gate(near, after), now | {"key": key, "value": value} | _named("memory", dict(memory.tensors))

    def _prefix(self) -> tuple[Tensor, Tensor]:
        _, key, value = self.attention.project(self.persistent[None])
        return key, value

    def _gain(self) -> Tensor:
        gain = self.memory.gain
        return self.persistent.new_ones(1) if gain is None else gain[:, None]


def _of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of a part."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}
