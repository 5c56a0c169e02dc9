"""What a pass over strips writes for each row, and the answer that comes of it, for the kernels that go strip by strip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.maps._request import Answer, Request
from regard.maps._scores import Scores
from regard.maps._strip import add_sinks, finish, shift

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

    def answer(self, transposed: Tensor | None) -> Answer:
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
        return Answer(logsumexp, self.forward, transposed, entropy=entropy, mass=self.mass)


def sinks_gradient(sinks: Tensor, logsumexp: Tensor, row_sums: Tensor, d_logsumexp: Tensor | None) -> Tensor:
    """A sink's share of its row, times the gradient that the row's shares have in common; in the form of ``sinks``."""
    gradient = -row_sums if d_logsumexp is None else d_logsumexp - row_sums
    return (torch.exp(sinks - logsumexp) * gradient).sum_to_size(sinks.shape)


def softmax(logits: Tensor, sinks: Tensor | None, units: Units) -> Tensor:
    """The probabilities in place of a strip's logits; 0 throughout in a row that sees nothing."""
    highest = shift(logits, sinks, units.hidden, units.to_log2)
    total = logits.exp2_().sum(dim=-1)
    if sinks is not None:
        add_sinks(total, sinks, highest, units.to_log2)
    return logits.div_(total.masked_fill_(total == 0, 1.0).unsqueeze(-1))
