"""A pass over strips, forward and backward, as far as it does not matter how a kernel cuts the matrix into them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.maps._request import (
    Answer,
    Request,
    received_as_weights,
    received_from_weights,
    segments_as_values,
    segments_from_values,
)
from regard.maps._scores import Scores
from regard.maps._strip import add_sinks, divisor_of, finish, shift, unlocked

# Up to this magnitude of the logits their exponentials need no shift by the row's maximum: far from float32's ends.
_UNSHIFTED = 20.0
# Hides a logit, and times a probability of 0 gives 0, which −inf would not.
_HIDDEN = -1e30
_LOG_2 = math.log(2)


@dataclass(frozen=True)
class Units:
    """How the strips of a call hold their logits.

    2ˣ is evaluated in half the time of eˣ and does not slow down where it underflows, so ``unit`` is log 2 nats. With an
    additive mask they are in nats until they are shifted, since its extremes (the least number of its dtype, by custom)
    would overflow. ``scale`` and ``softcap`` (0: none) are in these units; ``hidden`` is a logit of no weight.
    """

    unit: float
    to_log2: float
    hidden: float
    scale: float
    softcap: float
    shifted: bool

    @classmethod
    def of(cls, scores: Scores) -> Units:
        additive = scores.mask is not None and scores.mask.is_floating_point()
        unit = 1.0 if additive else _LOG_2
        return cls(
            unit=unit,
            to_log2=unit / _LOG_2,
            hidden=-math.inf if additive else _HIDDEN,  # below the extremes of an additive mask too
            scale=scores.scale / (scores.softcap or unit),
            softcap=(scores.softcap or 0.0) / unit,
            shifted=additive or scores.limit > _UNSHIFTED,
        )

    def sinks(self, scores: Scores, dtype: torch.dtype) -> Tensor | None:
        """One logit for each row, (B, Hq, N)."""
        if scores.sinks is None:
            return None
        return (scores.sinks.to(dtype) / self.unit).expand(scores.shape[:3]).contiguous()


class Workspace:
    """One call's tensors in the form in which strips read them."""

    def __init__(self, scores: Scores, dtype: torch.dtype) -> None:
        self.scores, self.dtype = scores, dtype
        self.units = Units.of(scores)
        self.query = scores.query.to(dtype).contiguous()
        self.key = self.of_keys(scores.key)
        self.of_thread = threading.local()

    def of_keys(self, tensor: Tensor) -> Tensor:
        """(B, heads, M, …) as (B · heads, M, …)."""
        return tensor.to(self.dtype).flatten(0, 1).contiguous()

    def compiled(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function as workers call it; a GPU has none, and its operators do not wait for the interpreter."""
        return unlocked(function) if self.query.device.type == "cpu" else function


class Rows:
    """Sums of exponentials over each row's keys, (B, Hq, N, …), by which its answers are divided in the end.

    They begin as those of rows that see no key, of which no strip need be visited.
    """

    def __init__(self, scores: Scores, request: Request, units: Units) -> None:
        def zeros(*width: int) -> Tensor:
            return torch.zeros(*scores.shape[:3], *width, dtype=request.dtype, device=scores.query.device)

        self.units = units
        self.sinks = units.sinks(scores, request.dtype)
        self.highest = zeros() if units.shifted else None
        self.total = zeros()
        if self.sinks is not None:
            if self.highest is not None:
                self.highest.copy_(self.sinks.masked_fill(self.sinks <= units.hidden / 2, 0.0))
            add_sinks(self.total, self.sinks, self.highest, units.to_log2)
        self.expected = zeros() if request.entropy else None
        self.mass = zeros(len(request.segments)) if request.segments else None
        self.forward = None if request.values is None else zeros(request.values.shape[-1])
        self.distance = None if request.distance is None else zeros()

    def answer(self, transposed: Tensor | None, blocks: Tensor | None = None) -> Answer:
        """The answer, once every strip was visited."""
        logsumexp, entropy = finish(
            self.total,
            self.highest,
            self.expected,
            self.mass,
            self.forward,
            self.sinks,
            self.units.unit,
            self.units.to_log2,
        )
        if self.distance is not None:
            self.distance.div_(divisor_of(self.total))
        return Answer(
            logsumexp, self.forward, transposed, entropy=entropy, mass=self.mass, blocks=blocks, distance=self.distance
        )


class Gradients:
    """What a backward pass reads, and the gradients that it writes for each row; those for each key are the kernel's.

    ``wanted_key`` and ``wanted_values`` are the keys and values if they want a gradient; ``logsumexp`` is in units, and +inf
    for rows that see nothing.
    """

    def __init__(self, work: Workspace, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        *inputs, logsumexp = ctx.saved_tensors
        self.inputs: list[Tensor | None] = inputs
        self.scale = work.scores.scale
        *_, values, weights = inputs
        self.values = None if values is None else work.of_keys(values)
        self.values_per_query_head = values is not None and values.shape[1] != work.scores.key.shape[1]
        self.weights = None if weights is None else weights.to(work.dtype).contiguous()
        self.natural_logsumexp = logsumexp.masked_fill(logsumexp.isneginf(), math.inf)
        self.logsumexp = self.natural_logsumexp / work.units.unit
        d_logsumexp, d_forward, d_transposed, d_entropy = gradients
        self.d_logsumexp = None if d_logsumexp is None else d_logsumexp.contiguous()
        self.d_forward = None if d_forward is None else d_forward.contiguous()
        self.d_transposed = None if d_transposed is None else work.of_keys(d_transposed)
        self.d_entropy = None if d_entropy is None else d_entropy.contiguous()
        needs = ctx.needs_input_grad[-len(inputs) :]
        query, self.wanted_key, mask, sinks, values, weights = (
            tensor if need else None for tensor, need in zip(inputs, needs, strict=True)
        )
        self.wanted_values = values if self.d_forward is not None else None
        new = work.query.new_zeros
        self.d_query = None if query is None else new(query.shape)
        self.d_mask = None if mask is None else new(mask.shape)
        self.row_sums = None if sinks is None else new(work.scores.shape[:3])
        self.d_weights = None if weights is None or self.d_transposed is None else new(weights.shape)

    def finish(self, d_key: Tensor | None, d_values: Tensor | None) -> list[Tensor | None]:
        """Those of query, key, mask, sinks, values and weights, once every strip was visited."""
        for product in (self.d_query, d_key):
            if product is not None:
                product.mul_(self.scale)
        sums = (self.d_query, d_key, self.d_mask, self._d_sinks(), d_values, self.d_weights)
        return [
            None if total is None or tensor is None else total.view(tensor.shape).to(tensor.dtype)
            for total, tensor in zip(sums, self.inputs, strict=True)
        ]

    def _d_sinks(self) -> Tensor | None:
        """A sink's share of its row, times the gradient that the row's shares have in common; in the form of the sinks."""
        sinks = self.inputs[3]
        if sinks is None or self.row_sums is None:
            return None
        gradient = -self.row_sums if self.d_logsumexp is None else self.d_logsumexp - self.row_sums
        return (torch.exp(sinks - self.natural_logsumexp) * gradient).sum_to_size(sinks.shape)


Forward = Callable[[Request], Answer]
Backward = Callable[[Any, tuple[Tensor | None, ...]], list[Tensor | None]]


def evaluate(scores: Scores, request: Request, forward: Forward, backward: Backward) -> Answer:
    """Answer the request by a kernel's two passes; differentiable in query, key, mask, sinks, values and weights."""
    request = received_as_weights(request)
    if scores.requires_grad or request.requires_grad:
        asked, request = request, segments_as_values(scores, request)
        tensors = (scores.query, scores.key, scores.mask, scores.sinks, request.values, request.weights)
        apply: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = _Differentiable.apply
        logsumexp, product, transposed, entropy = apply(forward, backward, request, *tensors)
        answer = segments_from_values(asked, Answer(logsumexp, product, transposed, entropy=entropy))
    else:
        with torch.no_grad():
            answer = forward(request)
    return received_from_weights(request, answer)


class _Differentiable(torch.autograd.Function):
    """A forward pass, and a backward pass that evaluates each strip again instead of having stored it."""

    @staticmethod
    def forward(
        ctx: Any, forward: Forward, backward: Backward, request: Request, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        answer = forward(request)
        ctx.by_kernel, ctx.request = backward, request
        ctx.save_for_backward(*tensors, answer.logsumexp)
        return answer.logsumexp, answer.forward, answer.transposed, answer.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return None, None, None, *ctx.by_kernel(ctx, gradients)


def softmax(logits: Tensor, sinks: Tensor | None, units: Units) -> Tensor:
    """The probabilities in place of a strip's logits; 0 throughout in a row that sees nothing."""
    highest = shift(logits, sinks, units.hidden, units.to_log2)
    total = logits.exp2_().sum(dim=-1)
    if sinks is not None:
        add_sinks(total, sinks, highest, units.to_log2)
    return logits.div_(total.masked_fill_(total == 0, 1.0).unsqueeze(-1))
