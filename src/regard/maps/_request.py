"""What is asked of a kernel in one pass, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regard.maps._scores import Scores

# Matrix products and fused operators are fastest at widths that this divides.
ALIGNMENT = 8


@dataclass(frozen=True)
class Request:
    """The products wanted of one attention matrix P.

    ``values`` (B, Hk or Hq, M, W) asks for ``P @ values``; ``weights`` (B, Hq, N, W) for ``Pᵀ @ weights``; ``received``
    (B, Hq, N), none negative, for ``Pᵀ @ received``; ``entropy`` for the entropy of each row. The log-sum-exp of each row
    always comes along. ``dtype`` is the precision to work in.
    """

    dtype: torch.dtype
    values: Tensor | None = None
    weights: Tensor | None = None
    received: Tensor | None = None
    entropy: bool = False

    @property
    def requires_grad(self) -> bool:
        tensors = (self.values, self.weights, self.received)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Answer:
    """``logsumexp``, ``entropy`` (B, Hq, N), ``forward`` (B, Hq, N, W), ``transposed`` (B, Hq, M, W), ``received`` (B, Hq, M)."""

    logsumexp: Tensor
    forward: Tensor | None = None
    transposed: Tensor | None = None
    received: Tensor | None = None
    entropy: Tensor | None = None


class Kernel(Protocol):
    """One way of evaluating a request."""

    def __call__(self, scores: Scores, request: Request) -> Answer:
        """Evaluate the request; raise Refusal where this kernel cannot."""
        ...


class Refusal(Exception):
    """A kernel cannot serve this request; the message says why."""
