"""A memory that learns while it reads: the weights of a small network, written by gradient steps on the tokens themselves.

Within a chunk all gradients are taken at the weights of its start, as both papers do: then momentum, decay and reading are
products of matrices, and no token needs weights of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from regard.mixers.forms import Form, check_form, check_heads
from regard.mixers.in_turn import in_turn
from regard.mixers.memory.aligned import Aligned
from regard.mixers.memory.choices import Bias, Decay, Lp, Retention
from regard.mixers.memory.network import network, recall, slopes

CHUNK = 16


def neural_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    weights: Sequence[Tensor],
    state: Mapping[str, Tensor] | None = None,
    *,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Bias = Lp(2.0),  # noqa: B008 - frozen
    retention: Retention = Decay(),  # noqa: B008 - frozen
    hidden_decay: float = 1.0,
    mask: Tensor | None = None,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}(k_t), v_t),  A_t = (1 − α_t) A_{t−1} + S_t,  o_t = M_t(q_t)``.

    S is the surprise, past and momentary; t' the start of the token's chunk; A is what is held, of which the retention makes
    the weights of M_t. One matrix is a linear memory; more are a network, ``M(x) = x + γ ∘ LN(W_L GELU(… W_1 x))``, whose γ
    is not written to. A token is written before it is read.

    As the layer norm takes the scale of what weights give, a network that is as large as decay and writing leave it turns by
    about ``√(2 α)`` a token, whatever the steps, and by ``√(2 α chunk)`` a chunk: from 1/2 on that is another network after
    each chunk, and gradients through many of them explode. A matrix has no such bound.

    The definition depends on ``chunk``, as the papers' training does: at 1, each gradient is at the weights that the token
    before left. All forms take the same chunks, which go on where the state stopped, in the middle of one if need be.

    Args:
        query, key: (B, H, N, Dk); keys of length 1 keep steps comparable.
        value: (B, H, N, Dv); Dv = Dk for a network.
        step: θ, (B, H, N).
        weights: what is held before the first token, (H, out, in) or (B, H, out, in) for each layer, from Dk to Dv.
        state: what an earlier call returned, in place of the weights.
        log_decay: log (1 − α), (B, H, N), at most 0; none by default.
        log_momentum: log η, (B, H, N), at most 0; without it the rule is plain gradient descent, ``S_t = −θ_t ∇ℓ``.
        threshold: the Huber bias's δ, (B, H, N, Dv).
        gain: γ, (H, Dv), of a network; ones by default.
        bias: the loss.
        retention: how weights follow from what is held.
        hidden_decay: what multiplies log (1 − α) for all matrices but the last. As far as they decay to where GELU is linear,
            a network has no more room than one matrix.
        mask: (B, N), true for real tokens: others are neither written nor counted, and their outputs are zeros.
        form: "parallel" the reference, a loop over tokens whose gradients are autograd's; "chunked" products of matrices;
            "recurrent" token by token.
        chunk: tokens whose gradients are taken at the same weights.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state, in float32 at least: for each layer ``held0``,
        ``start0`` (at the chunk's start) and ``surprise0``, (B, H, out, in); ``position`` (B,), the tokens read of the chunk.

    Raises:
        ValueError: shapes that do not fit.

    A. Behrouz, P. Zhong and V. Mirrokni (2024), Titans: Learning to Memorize at Test Time.

    >>> import torch
    >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 2, 50, 8), dim=-1)
    >>> decay, momentum = torch.rand(2, 1, 2, 50).log()
    >>> network = [torch.randn(2, 32, 8) / 8**0.5, torch.randn(2, 8, 32) / 32**0.5]
    >>> gates = {"step": torch.full((1, 2, 50), 0.1), "log_decay": decay, "log_momentum": momentum}
    >>> chunked, state = neural_memory(q, k, v, weights=network, **gates)
    >>> reference, _ = neural_memory(q, k, v, weights=network, **gates, form="parallel")
    >>> bool(torch.allclose(chunked, reference, atol=1e-4))
    True
    >>> state["held0"].shape, state["position"].item()
    (torch.Size([1, 2, 32, 8]), 2)
    """
    check_form(form)
    check_heads(query, key, value)
    _check(query, value, chunk, step, log_decay, log_momentum, threshold, gain, mask, weights)
    dtype = torch.promote_types(value.dtype, torch.float32)

    def spread(tensor: Tensor | None) -> Tensor:
        return torch.zeros_like(step, dtype=dtype) if tensor is None else tensor.to(dtype)

    learner = _Learner(
        bias, retention, hidden_decay, log_momentum is not None, chunk,
        query.new_ones(1, dtype=dtype) if gain is None else gain.to(dtype)[:, None],
    )  # fmt: skip
    tokens = _Tokens(
        query.to(dtype), key.to(dtype), value.to(dtype),
        spread(step), spread(log_decay), spread(log_momentum),
        query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool) if mask is None else mask,
        None if threshold is None else threshold.to(dtype),
    )  # fmt: skip
    now = _begin([weight.to(dtype) for weight in weights], state, tokens, learner.momentum)
    with torch.autocast(value.device.type, enabled=False):  # which would round products of float32
        if form == "chunked":
            output, after = _chunked(learner, tokens, now, mask, begins=state is None)
        else:
            gradients = _by_autograd if form == "parallel" else _by_hand
            output, after = _token_by_token(learner, tokens, now, gradients)
    return output.masked_fill(~tokens.real[:, None, :, None], 0.0).to(value.dtype), after.tensors()


@dataclass(frozen=True)
class _Tokens:
    """What comes with each token, along dimension 2 (of ``real``, 1)."""

    query: Tensor
    key: Tensor
    value: Tensor
    step: Tensor
    decay: Tensor
    momentum: Tensor
    real: Tensor
    threshold: Tensor | None

    def apply(self, change: Callable[[Tensor], Tensor]) -> _Tokens:
        """These tokens with each of their tensors (B, H, N, ...) changed."""
        real = change(self.real[:, None])[:, 0]
        threshold = None if self.threshold is None else change(self.threshold)
        gates = change(self.step), change(self.decay), change(self.momentum)
        return _Tokens(change(self.query), change(self.key), change(self.value), *gates, real, threshold)

    def part(self, first: int, last: int) -> _Tokens:
        return self.apply(lambda tensor: tensor[:, :, first:last])


@dataclass(frozen=True)
class _Now:
    """The memory between two tokens: a tensor (B, H, out, in) for each layer, and the tokens read of the chunk (B,)."""

    held: list[Tensor]
    start: list[Tensor]
    surprise: list[Tensor]
    position: Tensor

    @property
    def numbers(self) -> int:
        """Of a memory and its surprise."""
        return sum(tensor.numel() for tensor in (*self.held, *self.surprise))

    def tensors(self) -> dict[str, Tensor]:
        named = {"held": self.held, "start": self.start, "surprise": self.surprise}
        tensors = {f"{name}{number}": tensor for name, layers in named.items() for number, tensor in enumerate(layers)}
        return tensors | {"position": self.position}

    def renewed(self, full: Tensor | bool) -> list[Tensor]:
        """The starts, where chunks (B,) have ended: what is held."""
        if isinstance(full, bool):
            return self.held if full else self.start
        return [
            torch.where(full[:, None, None, None], held, start)
            for held, start in zip(self.held, self.start, strict=True)
        ]


@dataclass(frozen=True)
class _Learner:
    """What is the same for all tokens."""

    bias: Bias
    retention: Retention
    hidden_decay: float
    momentum: bool
    chunk: int
    gain: Tensor

    def weights(self, now: _Now) -> list[Tensor]:
        """At the chunk's start."""
        return [self.retention.weights(start, start) for start in now.start]

    def slopes(self, now: _Now, tokens: _Tokens | _Chunk) -> list[tuple[Tensor, Tensor]]:
        """There, of each token."""
        return slopes(self.weights(now), tokens.key, tokens.value, tokens.threshold, self.gain, self.bias)


def _by_autograd(learner: _Learner, now: _Now, token: _Tokens) -> list[Tensor]:
    """The gradient of the loss of one token by the weights of the chunk's start, (B, H, out, in) each."""
    with torch.enable_grad():
        weights = [weight if weight.requires_grad else weight.requires_grad_() for weight in learner.weights(now)]
        output = recall(token.key, weights, learner.gain)
        loss = learner.bias.loss(output, token.value, token.threshold).sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
    return [gradient if torch.is_grad_enabled() else gradient.detach() for gradient in gradients]


def _by_hand(learner: _Learner, now: _Now, token: _Tokens) -> list[Tensor]:
    return [delta.mT @ z for delta, z in learner.slopes(now, token)]


def _token_by_token(
    learner: _Learner, tokens: _Tokens, now: _Now, gradients: Callable[[_Learner, _Now, _Tokens], list[Tensor]]
) -> tuple[Tensor, _Now]:
    """Each token's write and read, one after another: the rule as it is defined."""
    outputs = []
    for i in range(tokens.query.shape[2]):
        token = tokens.part(i, i + 1)
        step, momentum = token.step[..., None], token.momentum.exp()[..., None]
        hidden, last = (decay.exp()[..., None] for decay in (learner.hidden_decay * token.decay, token.decay))
        decays = [hidden] * (len(now.held) - 1) + [last]
        writes = [-step * slope for slope in gradients(learner, now, token)]
        if learner.momentum:
            writes = [momentum * old + write for old, write in zip(now.surprise, writes, strict=True)]
        held = [decay * old + write for decay, old, write in zip(decays, now.held, writes, strict=True)]
        now = _where(token.real, replace(now, held=held, surprise=writes if learner.momentum else []), now)
        weights = [learner.retention.weights(*pair) for pair in zip(now.held, now.start, strict=True)]
        outputs.append(recall(token.query, weights, learner.gain))
        position = now.position + token.real[:, 0]
        full = position == learner.chunk
        now = replace(now, start=now.renewed(full), position=position.masked_fill(full, 0))
    return torch.cat(outputs, dim=2), now


def _where(real: Tensor, new: _Now, old: _Now) -> _Now:
    """The new where a token (B, 1) is real."""
    real = real[..., None, None]
    held = [torch.where(real, *pair) for pair in zip(new.held, old.held, strict=True)]
    surprise = [torch.where(real, *pair) for pair in zip(new.surprise, old.surprise, strict=True)]
    return replace(new, held=held, surprise=surprise)


def _chunked(
    learner: _Learner, tokens: _Tokens, now: _Now, mask: Tensor | None, *, begins: bool
) -> tuple[Tensor, _Now]:
    """Chunk after chunk, each text's tokens moved so that its own chunks begin where those of all do."""
    aligned = Aligned(tokens.query, None if begins else now.position, mask, learner.chunk)
    if not aligned.slots:  # padding alone
        return torch.zeros_like(tokens.value), now
    tokens = tokens.apply(aligned.place)
    alike = learner.hidden_decay == 1 or len(now.held) == 1
    decays = [tokens.decay] if alike else [learner.hidden_decay * tokens.decay, tokens.decay]
    of_decays = _chunks(learner, tokens, decays)
    hidden, chunks = of_decays[0], of_decays[-1]
    filled = [aligned.filled(slot + learner.chunk) for slot in range(0, aligned.slots, learner.chunk)]

    def step(part: tuple[_Chunk, _Chunk, Tensor | bool], now: _Now) -> tuple[Tensor, _Now]:
        output, now = _read(learner, *part[:2], now)
        return output, replace(now, start=now.renewed(part[2]))

    outputs, now = in_turn(
        step, list(zip(hidden, chunks, filled, strict=True)), now, now.numbers, math.isqrt(len(chunks))
    )
    return aligned.take(torch.cat(outputs, dim=2)), replace(now, position=aligned.ends % learner.chunk)


class _Chunk(NamedTuple):
    """The tokens of a chunk, (B, H, n, …), and how much of what stands where.

    ``A_t = β_t A_0 + c_t S_0 − Σ_{i≤t} w_ti δ_i z_iᵀ``, with β the decay so far, ``w = D E diag(θ)`` and ``c = D η̄`` where D
    and E are the decay and the momentum between two tokens, and η̄ the momentum so far: ``keep``, ``write`` and ``carry``.
    ``stay`` and ``last`` are η̄ and the rows of E diag(θ) at the chunk's end, of which the surprise there is made.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    write: Tensor
    carry: Tensor | None
    stay: Tensor | None
    last: Tensor | None
    threshold: Tensor | None


def _chunks(learner: _Learner, tokens: _Tokens, decays: list[Tensor]) -> list[list[_Chunk]]:
    """What does not depend on the memory, of all chunks at once, for each of the decays of the tokens."""

    def cut(tensor: Tensor) -> Tensor:
        parts: Tensor = tensor.unflatten(2, (-1, learner.chunk))
        return parts

    step, real = cut(tokens.step)[..., None, :], cut(tokens.real[:, None])[..., None, :]
    stay = last = between = None
    if learner.momentum:
        stay, between = _between(cut(tokens.momentum))
        last = (between[..., -1:, :] * step).mT
    each = (cut(tokens.query), cut(tokens.key), cut(tokens.value))
    threshold = None if tokens.threshold is None else cut(tokens.threshold)
    found = []
    for decay in decays:
        keep, arrive = _between(cut(decay))
        arrive = arrive * real  # what is no token moves nothing from the surprise to the memory
        carry, write = None, arrive * step
        if stay is not None and between is not None:
            carry, write = arrive @ stay, arrive @ between * step
        end = None if stay is None else stay[..., -1:, :]
        columns = [
            [None] * keep.shape[2] if tensor is None else tensor.unbind(2)
            for tensor in (*each, keep, write, carry, end, last, threshold)
        ]
        found.append([_Chunk(*row) for row in zip(*columns, strict=True)])
    return found


def _read(learner: _Learner, hidden: _Chunk, chunk: _Chunk, now: _Now) -> tuple[Tensor, _Now]:
    """The outputs of a chunk's tokens, and the memory after them; all matrices but the last keep as ``hidden`` says."""
    written = learner.slopes(now, chunk)
    products = _Products(learner.retention, now, written, [hidden] * (len(written) - 1) + [chunk])
    output = network(products, len(written), chunk.query, learner.gain).output
    surprise = []
    if chunk.stay is not None and chunk.last is not None:
        surprise = [
            chunk.stay * old - (chunk.last * delta).mT @ z
            for old, (delta, z) in zip(now.surprise, written, strict=True)
        ]
    return output, replace(now, held=products.after(), surprise=surprise)


def _between(log: Tensor) -> tuple[Tensor, Tensor]:
    """From logs of factors (…, n): their product so far (…, n, 1), and that between two tokens (…, n, n)."""
    total = log.cumsum(-1)[..., None]
    hidden = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
    return total.exp(), (total - total.mT).masked_fill(hidden, -torch.inf).exp()


@dataclass(frozen=True)
class _Products:
    """The products with each token's own weights, which are not made."""

    retention: Retention
    now: _Now
    written: list[tuple[Tensor, Tensor]]
    chunks: list[_Chunk]
    """Of each matrix, which differ in how much is kept."""

    def __call__(self, layer: int, a: Tensor) -> Tensor:
        if not self.retention.linear:
            weights = self.retention.weights(self._held(layer, slice(None)), self.now.start[layer])
            return (weights @ a[..., None]).squeeze(-1)
        (delta, z), chunk = self.written[layer], self.chunks[layer]
        product = chunk.keep * (a @ self.now.held[layer].mT) - (chunk.write * (a @ z.mT)) @ delta
        if chunk.carry is not None:
            product = product + chunk.carry * (a @ self.now.surprise[layer].mT)
        scale = self.retention.scale(self.now.start[layer])
        return product if scale is None else product * scale

    def after(self) -> list[Tensor]:
        """What is held after the last token."""
        after = []
        for number, ((delta, z), chunk, held) in enumerate(zip(self.written, self.chunks, self.now.held, strict=True)):
            kept = chunk.keep[:, :, -1:] * held
            if chunk.carry is not None:
                kept = kept + chunk.carry[:, :, -1:] * self.now.surprise[number]
            after.append(kept - (chunk.write[:, :, -1, :, None] * delta).mT @ z)
        return after

    def _held(self, layer: int, which: slice) -> Tensor:
        """What is held after each of these tokens, (B, H, tokens, out, in)."""
        (delta, z), chunk = self.written[layer], self.chunks[layer]
        held = chunk.keep[:, :, which, :, None] * self.now.held[layer][:, :, None]
        if chunk.carry is not None:
            held = held + chunk.carry[:, :, which, :, None] * self.now.surprise[layer][:, :, None]
        return held - (chunk.write[:, :, which, :, None] * delta[:, :, None]).mT @ z[:, :, None]


def _begin(weights: list[Tensor], state: Mapping[str, Tensor] | None, tokens: _Tokens, momentum: bool) -> _Now:
    batch = tokens.query.shape[0]
    held = [weight.expand(batch, *weight.shape[-3:]) for weight in weights]
    surprise = [torch.zeros_like(weight) for weight in held] if momentum else []
    now = _Now(held, held, surprise, torch.zeros(batch, dtype=torch.long, device=tokens.query.device))
    if state is None:
        return now
    expected = {name: tuple(tensor.shape) for name, tensor in now.tensors().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise ValueError(f"the state must be of {expected}, got {found}")
    layers = range(len(weights))
    held, start = ([state[f"{name}{layer}"].to(held[0]) for layer in layers] for name in ("held", "start"))
    return _Now(held, start, [state[f"surprise{layer}"].to(held[0]) for layer in layers if momentum], state["position"])


def _check(
    query: Tensor, value: Tensor, chunk: int, step: Tensor, log_decay: Tensor | None, log_momentum: Tensor | None,
    threshold: Tensor | None, gain: Tensor | None, mask: Tensor | None, weights: Sequence[Tensor],
) -> None:  # fmt: skip
    batch, heads, length, _ = query.shape
    if chunk < 1:
        raise ValueError(f"a chunk must hold at least 1 token, got chunk={chunk}")
    fitting = {
        "step": (step, (batch, heads, length)),
        "log_decay": (log_decay, (batch, heads, length)),
        "log_momentum": (log_momentum, (batch, heads, length)),
        "threshold": (threshold, tuple(value.shape)),
        "gain": (gain, (heads, value.shape[3])),
        "mask": (mask, (batch, length)),
    }
    for name, (tensor, shape) in fitting.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(tensor.shape)}")
    _check_weights(query, value, weights)


def _check_weights(query: Tensor, value: Tensor, weights: Sequence[Tensor]) -> None:
    batch, heads = query.shape[:2]
    widths = [query.shape[3], *(weight.shape[-2] for weight in weights if weight.ndim > 1)]
    shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
    expected = [(heads, after, before) for before, after in pairwise(widths)]
    fits = [weight.shape in (one, (batch, *one)) for weight, one in zip(weights, expected, strict=False)]
    if not weights or len(fits) < len(weights) or not all(fits) or widths[-1] != value.shape[3]:
        raise ValueError(
            f"weights must be (heads, out, in) each, or (batch, heads, out, in), from {query.shape[3]} to {value.shape[3]} "
            f"for {batch} texts and {heads} heads, got {shapes or 'none'}"
        )
    if len(weights) > 1 and query.shape[3] != value.shape[3]:
        raise ValueError(
            "a memory of several layers adds its input to its output: keys and values must be of one width, got "
            f"{query.shape[3]} and {value.shape[3]}"
        )
