"""Miras: a layer for every choice of memory, attentional bias, retention and learning rule, among them three of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, ParameterList, RMSNorm, Sequential, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear.short_convolution import ShortConvolution, convolved_heads
from regard.mixers.memory._neural_memory import CHUNK, neural_memory
from regard.mixers.memory.choices import KL, Decay, Design, DotProduct, Huber, Lp, Lq, Memory
from regard.mixers.mixer import Facts, check_divides, gated, split_heads
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer

_PAPER = (
    "A. Behrouz et al. (2025), It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
    "Retention, and Online Optimization"
)
_KEEP = 7.0  # 1 − α begins at sigmoid(7), 0.999: what is written lasts for about 1,000 tokens
_HIDDEN_DECAY = 0.1
_RANK = 32
_THRESHOLD = 1.8545  # softplus of it is 2
_VALUES = 6.0  # the deviation of what projection, convolution and SiLU give is about 1/6 at first


class Miras(ValueMixer):
    """A layer around `neural_memory`, made by four choices: gradient steps on ``ℓ(W; k_t, v_t) + Ret(W, W_{t−1})``.

    Short convolutions and SiLU before queries, keys and values, keys and queries of length 1, an RMS norm of each head's
    output, a SiLU gate of the tokens on it. One memory for each head; its first weights are learned: a matrix begins empty,
    those of a network such that what each gives is about of variance 1 (of a last matrix of zeros, the layer norm would make
    as much of the first token as of all that follow).

    Values are six times what their convolution gives, by which they begin about of variance 1, as what a network gives: it
    adds its input to its output, and thus has to learn ``v − k``, of which values much shorter than keys would be the least
    part. Where the retention is KL, they are not, for there each step multiplies weights by the exponential of an error.

    The paper makes step, decay and threshold of each channel from the token and leaves their activations open. Here step and
    decay are one for each head, so that a chunk is products of matrices, and sigmoids: ``1 − α`` begins at 0.999, η at 0.5,
    and ``θ = (1 − η) · largest_step · sigmoid(·)``: a long momentum takes no longer steps, and a matrix does not write keys
    that repeat through a chunk beyond their value, as long as ``largest_step · chunk`` is at most 1. The threshold is of
    each channel, by a projection of low rank and softplus, and begins at 2, beyond the errors of most: a network's output has
    variance 1, and errors that were all cut would pull it to the corners of a cube, from wherever it is.

    Where weights decay, ``1 − α`` of all matrices but the last is its tenth root: the layer norm makes up for a last matrix
    that has shrunk, but before a first one that has, GELU is linear, and the network no more than a matrix.

    Args:
        dim: of the tokens.
        heads: that divide it.
        design: the four choices.
        chunk: tokens whose gradients are taken at the same weights; fewer are nearer to a step for each token, and slower.
        largest_step: of the gradient; by default 1 / chunk for a matrix, twice that for a network, whose decay bounds it
            (in `Yaad` eight times, as its errors are cut).
        convolution: tokens that the short convolutions see.

    A. Behrouz et al. (2025), It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and
    Online Optimization.

    >>> import torch
    >>> from regard.mixers import Design, Huber, Memory
    >>> mixer = Miras(32, heads=4, design=Design(Memory(depth=1), Huber(), momentum=True))
    >>> y, state = mixer(torch.randn(2, 20, 32))
    >>> y.shape, state.tensors["held0"].shape
    (torch.Size([2, 20, 32]), torch.Size([2, 4, 8, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="W_t = argmin_W ℓ(W; k_t, v_t) + Ret(W, W_{t−1}),  o_t = M(W_t, q_t)",
        time="O(E N D²/H)",
        state="2 E D²/H + 3 (K − 1) D",
    )

    network_step: ClassVar[float] = 2.0
    """Of a network, the default of ``largest_step · chunk``."""

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        design: Design | None = None,
        *,
        chunk: int = CHUNK,
        largest_step: float | None = None,
        convolution: int = 4,
    ) -> None:
        super().__init__(dim)
        check_divides(type(self).__name__, dim, heads)
        if chunk < 1 or (largest_step is not None and largest_step <= 0):
            raise ValueError(
                f"{type(self).__name__}: chunk must be at least 1 and largest_step positive, got chunk={chunk} and "
                f"largest_step={largest_step}"
            )
        self.heads, self.chunk, self.design = heads, chunk, design or Design()
        self.largest_step = largest_step or (1.0 if self.design.memory.depth == 1 else self.network_step) / chunk
        self.value_scale = _VALUES if self.design.retention.linear else 1.0
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.conv1d = ShortConvolution(3 * dim, convolution)
        self.step, self.keep = Linear(dim, heads), Linear(dim, heads)
        torch.nn.init.zeros_(self.step.bias)
        torch.nn.init.constant_(self.keep.bias, _KEEP)
        self.momentum = Linear(dim, heads) if self.design.momentum else None
        self.threshold = _low_rank(dim) if isinstance(self.design.bias, Huber) else None
        self.memory, self.gain = self._memory(dim // heads)
        self.norm = RMSNorm(dim // heads, eps=1e-5)
        self.g_proj = Linear(dim, dim, bias=False)
        self.o_proj = Linear(dim, dim, bias=False)

    def _memory(self, width: int) -> tuple[ParameterList, Parameter | None]:
        """What is held before the first token, and the gain of a network."""
        memory, retention = self.design.memory, self.design.retention
        first = [
            torch.randn(self.heads, *shape) / (1 if layer == 0 else math.sqrt(shape[1]))  # keys are of length 1
            for layer, shape in enumerate(memory.shapes(width, width))
        ]
        if memory.depth == 1:
            first[0].zero_()
        gain = Parameter(torch.ones(self.heads, width)) if memory.depth > 1 else None
        return ParameterList([Parameter(retention.begin(weight)) for weight in first]), gain

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries, keys and values behind one convolution, the first two of length 1, and what tells how to learn."""
        before, mask = None if state is None else state["tail"], layout.mask
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value, tail = convolved_heads(x, projections, self.conv1d, self.heads, before, mask)
        parts = {"query": functional.normalize(query, dim=-1), "key": functional.normalize(key, dim=-1), "x": x}
        if self.threshold is not None:
            parts["threshold"] = split_heads(functional.softplus(self.threshold(x)), self.heads)
        return Projected(self.value_scale * value, parts | self._gates(x), {"tail": tail})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Learn the values by their keys, and read with queries."""
        return self._learned(projected, list(self.memory), state, layout.mask)

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, gated, and the output's projection."""
        y: Tensor = self.o_proj(gated(self.norm(mixed), projected["x"], self.g_proj))
        return y

    def hidden_map(self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout) -> HiddenMap:
        """The matrix of the values after their convolution, where the memory is one and its bias ℓ₂ or a dot product.

        What the memory held before the first token comes on top of what the values give.
        """
        self._check_linear()
        *_, tokens, key_width = projected["key"].shape

        def apply(values: Tensor) -> Tensor:
            nothing = [values.new_zeros(self.heads, values.shape[3], key_width)]
            before = None if state is None else _empty(state, values.shape[3])
            return self._learned(projected.with_value(values), nothing, before, layout.mask)[0]

        return HiddenMap(apply, (*projected["key"].shape[:3], tokens), projected.value)

    def system(self, x: Tensor) -> DynamicalSystem:
        """Λ of what is held, what was at the chunk's start, and the surprise where there is momentum; b = θ k, c = q.

        It begins with what the memory holds before the first token. `dynamical_system` has the blocks of Λ.

        Raises:
            NotImplementedError: a memory that is no matrix, or not kept by decay and written by ℓ₂ or a dot product.
        """
        self._check_linear()
        projected = self.project(x)
        query, key = projected["query"], projected["key"]
        transition, into = self._blocks(projected)
        size = (2 if self.momentum is None else 3) * key.shape[3]
        held = self.memory[0].mT
        before = torch.cat([held, held, torch.zeros_like(held)], dim=1)[:, :size].expand(len(x), -1, -1, -1)
        out = functional.pad(query, (0, size - key.shape[3]))
        return DynamicalSystem(transition[..., :size, :size], into[..., :size], out, before)

    def _blocks(self, projected: Projected) -> tuple[Tensor, Tensor]:
        """Λ (B, H, N, 3 D, 3 D) and b (B, H, N, 3 D) of held, start and surprise."""
        key, step, log_decay = projected["key"], projected["step"], projected["log_decay"]
        log_momentum = projected.get("log_momentum")
        written = step[..., None] * key
        one = torch.eye(key.shape[3]).to(key).expand(*key.shape, -1)
        none = torch.zeros_like(one)
        keep = log_decay.exp()[..., None, None] * one
        carry = none if log_momentum is None else log_momentum.exp()[..., None, None] * one
        learn = none if self.design.bias == DotProduct() else -written[..., None] * key[..., None, :]
        held, surprise = (torch.cat([old, learn, carry], dim=-1) for old in (keep, none))
        last = torch.arange(1, key.shape[2] + 1, device=key.device)[:, None] % self.chunk == 0
        start = torch.where(last[..., None], held, torch.cat([none, one, none], dim=-1))  # after the last, what is held
        return torch.cat([held, start, surprise], dim=-2), torch.cat([written, written * last, written], dim=-1)

    @property
    def hides_map(self) -> bool:
        """Only where its choices make the output linear in values."""
        choices = self.design
        return choices.memory.depth == 1 and choices.bias in (Lp(2), DotProduct()) and choices.retention == Decay()

    def _check_linear(self) -> None:
        """Refuse choices by which the output is not linear in values."""
        if not self.hides_map:
            raise NotImplementedError(
                f"{type(self).__name__} mixes values by a matrix only where its memory is one, kept by decay and written by "
                f"ℓ₂ or a dot product; this is {self.design}"
            )

    def _learned(
        self, projected: Projected, held: list[Tensor], state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        query = projected["query"]
        return neural_memory(
            query, projected["key"], projected.value, projected["step"], held,
            None if state is None else {name: tensor for name, tensor in state.items() if name != "tail"},
            log_decay=projected["log_decay"], log_momentum=projected.get("log_momentum"),
            threshold=projected.get("threshold"),
            gain=self.gain, bias=self.design.bias, retention=self.design.retention,
            hidden_decay=_HIDDEN_DECAY if self.design.retention == Decay() else 1.0, mask=mask,
            form="recurrent" if query.shape[2] == 1 else "chunked", chunk=self.chunk,
        )  # fmt: skip

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """θ, log (1 − α) and, where there is momentum, log η, (B, H, N)."""
        step = self.largest_step * self.step(x).sigmoid().mT
        log_decay = functional.logsigmoid(self.keep(x)).mT
        if self.momentum is None:
            return {"step": step, "log_decay": log_decay}
        logits = self.momentum(x).mT
        step = step * (-logits).sigmoid()
        return {"step": step, "log_decay": log_decay, "log_momentum": functional.logsigmoid(logits)}


def _empty(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """A state after as many tokens that holds nothing, for values of this width."""
    return {
        name: tensor if name == "position" else torch.zeros_like(tensor[:, :, :1]).expand(-1, -1, width, -1)
        for name, tensor in state.items()
        if name != "tail"
    }


def _low_rank(dim: int) -> Sequential:
    last = Linear(min(_RANK, dim), dim)
    torch.nn.init.constant_(last.bias, _THRESHOLD)
    return Sequential(Linear(dim, min(_RANK, dim), bias=False), last)


class Moneta(Miras):
    """An ℓ_p bias and ℓ_q retention: ``A_t = (1 − α_t) A_{t−1} − θ_t ∇ℓ_p,  W_t = A_t / (mean |A|^q + 1)^{(q−2)/q}``, p = 3,
    q = 4.

    The paper divides by ``‖A_t‖_q^{q−2}``; here by that of the mean power, with a floor, at each chunk's start, of each
    matrix of a head (`Lq`). The loss is ``‖r‖_p^p / p``, its factor p left to the step.

    Args:
        dim: of the tokens.
        heads: that divide it.
        p: of the bias.
        q: of the retention.
        memory: a network of two matrices by default.
        chunk, largest_step, convolution: as in `Miras`.

    A. Behrouz et al. (2025), It's All Connected.

    >>> import torch
    >>> y, state = Moneta(32, heads=4)(torch.randn(2, 20, 32))
    >>> y.shape, state.tensors["held0"].shape
    (torch.Size([2, 20, 32]), torch.Size([2, 4, 32, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="A_t = (1 − α_t) A_{t−1} − θ_t ∇‖M(k_t) − v_t‖_p^p,  W_t = A_t / (mean |A|^q + 1)^{(q−2)/q},  "
        "o_t = M(W_t, q_t)",
        time="O(8 N D²/H)",
        state="16 D²/H + 3 (K − 1) D",
    )

    def __init__(
        self, dim: int, heads: int = 4, p: float = 3.0, q: float = 4.0, *, memory: Memory | None = None,
        chunk: int = CHUNK, largest_step: float | None = None, convolution: int = 4,
    ) -> None:  # fmt: skip
        design = Design(memory or Memory(), Lp(p), Lq(q))
        super().__init__(dim, heads, design, chunk=chunk, largest_step=largest_step, convolution=convolution)


class OfDesign(Miras):
    """A layer whose choices are made, but for the memory."""

    choices: ClassVar[Design]

    def __init__(
        self, dim: int, heads: int = 4, *, memory: Memory | None = None,
        chunk: int = CHUNK, largest_step: float | None = None, convolution: int = 4,
    ) -> None:  # fmt: skip
        design = self.choices if memory is None else replace(self.choices, memory=memory)
        super().__init__(dim, heads, design, chunk=chunk, largest_step=largest_step, convolution=convolution)


class Yaad(OfDesign):
    """Huber's bias and decay: ``W_t = (1 − α_t) W_{t−1} − θ_t ∇ℓ_δ``, errors counted up to a threshold δ_t that tokens set.

    The paper switches from ℓ₂ to ℓ₁ by the norm of the error or by coordinate; here by coordinate, with a slope that is
    continuous: an error cut at ±δ.

    Args:
        dim: of the tokens.
        heads: that divide it.
        memory: a network of two matrices by default.
        chunk, largest_step, convolution: as in `Miras`.

    A. Behrouz et al. (2025), It's All Connected.

    >>> import torch
    >>> y, state = Yaad(32, heads=4)(torch.randn(2, 20, 32))
    >>> y.shape
    torch.Size([2, 20, 32])
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="W_t = (1 − α_t) W_{t−1} − θ_t ∇Huber_δ(M(k_t) − v_t),  o_t = M(W_t, q_t)",
        time="O(8 N D²/H)",
        state="16 D²/H + 3 (K − 1) D",
    )

    choices = Design(Memory(), Huber())
    network_step = 8.0


class Memora(OfDesign):
    """KL retention: ``W_t = c softmax((1 − α_t) log W_{t−1} − θ_t ∇ℓ_2)``, weights that are positive and sum to c.

    The paper leaves c and what the softmax runs over open: here over each unit's inputs, with c their number, so that weights
    are 1 on average. It takes the softmax once for each chunk and goes on linearly from there; here every token reads with
    its own softmax, exactly, which takes weights for each token of a chunk, and gradients alone are those of its start.

    Args:
        dim: of the tokens.
        heads: that divide it.
        memory: a network of two matrices by default.
        chunk, largest_step, convolution: as in `Miras`.

    A. Behrouz et al. (2025), It's All Connected.

    >>> import torch
    >>> y, state = Memora(32, heads=4)(torch.randn(2, 20, 32))
    >>> y.shape
    torch.Size([2, 20, 32])
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="W_t = c softmax((1 − α_t) log W_{t−1} − θ_t ∇‖M(k_t) − v_t‖²),  o_t = M(W_t, q_t)",
        time="O(8 N D²/H)",
        state="16 D²/H + 3 (K − 1) D",
    )

    choices = Design(Memory(), Lp(2), KL())
