"""What is asked of a kernel in one pass, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.maps._scores import Scores

# Matrix products and fused operators are fastest at widths that this divides.
ALIGNMENT = 8


@dataclass(frozen=True)
class Blocks:
    """A picture of the matrix: ``Σ_i,j w_i P_ij C_jc`` over the queries of each block, (B, Hq, blocks, W).

    ``weights`` (B, Hq, N) are w; ``of_queries`` (N,) the block of each query, never less than that of the query before;
    ``number`` how many blocks there are; ``columns`` (M, W) are C, 1 where key j is of block c.
    """

    weights: Tensor
    of_queries: Tensor
    number: int
    columns: Tensor

    def edges(self) -> list[list[int]]:
        """Each block of neighbouring queries as (block, first, the one that follows its last)."""
        blocks, counts = torch.unique_consecutive(self.of_queries, return_counts=True)
        stops = counts.cumsum(0)
        edges: list[list[int]] = torch.stack([blocks, stops - counts, stops], dim=1).tolist()
        return edges


@dataclass(frozen=True)
class Request:
    """The products wanted of one attention matrix P.

    ``values`` (B, Hk or Hq, M, W) asks for ``P @ values``; ``weights`` (B, Hq, N, W) for ``Pᵀ @ weights``; ``received``
    (B, Hq, N), none negative, for ``Pᵀ @ received``; ``entropy`` for the entropy of each row; ``blocks`` for a picture;
    ``distance`` for ``Σ_j P_ij |i + distance − j|`` of each row. The log-sum-exp of each row always comes along. ``dtype`` is
    the precision to work in; ``progress`` is told the share of the pass that is done, where it goes piece by piece.
    """

    dtype: torch.dtype
    values: Tensor | None = None
    weights: Tensor | None = None
    received: Tensor | None = None
    entropy: bool = False
    segments: tuple[tuple[slice, ...], ...] = ()
    blocks: Blocks | None = None
    distance: int | None = None
    progress: Callable[[float], None] | None = None

    @property
    def requires_grad(self) -> bool:
        tensors = (self.values, self.weights, self.received)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Answer:
    """``logsumexp``, ``entropy`` and ``distance`` are (B, Hq, N), ``forward`` (B, Hq, N, W), ``mass`` (B, Hq, N, segments),
    ``transposed`` (B, Hq, M, W), ``received`` (B, Hq, M), ``blocks`` (B, Hq, blocks, W).
    """

    logsumexp: Tensor
    forward: Tensor | None = None
    transposed: Tensor | None = None
    received: Tensor | None = None
    entropy: Tensor | None = None
    mass: Tensor | None = None
    blocks: Tensor | None = None
    distance: Tensor | None = None


def segments_as_values(scores: Scores, request: Request) -> Request:
    """The request with one more column of values for each segment, 1 at its keys."""
    if not request.segments:
        return request
    batch, _, _, keys = scores.shape
    heads = scores.key.shape[1] if request.values is None else request.values.shape[1]
    columns = torch.zeros(keys, len(request.segments), dtype=request.dtype, device=scores.key.device)
    for column, runs in zip(columns.unbind(dim=-1), request.segments, strict=True):
        for run in runs:
            column[run] = 1
    columns = columns.expand(batch, heads, -1, -1)
    values = columns if request.values is None else torch.cat([request.values.to(request.dtype), columns], dim=-1)
    return replace(request, values=values, segments=())


def segments_from_values(request: Request, answer: Answer) -> Answer:
    """The answer to a request that was evaluated with its segments as values."""
    if not request.segments or answer.forward is None:
        return answer
    width = answer.forward.shape[-1] - len(request.segments)
    forward = None if request.values is None else answer.forward[..., :width]
    return replace(answer, forward=forward, mass=answer.forward[..., width:])


def blocks_as_values(scores: Scores, request: Request) -> Request:
    """The request with the columns of its picture as further columns of values."""
    if request.blocks is None:
        return request
    batch, _, _, keys = scores.shape
    heads = scores.key.shape[1] if request.values is None else request.values.shape[1]
    columns = request.blocks.columns.to(request.dtype).expand(batch, heads, keys, -1)
    values = columns if request.values is None else torch.cat([request.values.to(request.dtype), columns], dim=-1)
    return replace(request, values=values, blocks=None)


def blocks_from_values(request: Request, answer: Answer) -> Answer:
    """The answer to a request that was evaluated with its picture as values."""
    blocks = request.blocks
    if blocks is None or answer.forward is None:
        return answer
    width = answer.forward.shape[-1] - blocks.columns.shape[-1]
    forward = None if request.values is None else answer.forward[..., :width]
    weighted = answer.forward[..., width:] * blocks.weights.unsqueeze(-1)
    sums = weighted.new_zeros(*weighted.shape[:2], blocks.number, weighted.shape[-1])
    return replace(answer, forward=forward, blocks=sums.index_add_(2, blocks.of_queries, weighted))


def received_as_weights(request: Request) -> Request:
    """The request with what keys receive as one more column of weights."""
    if request.received is None:
        return request
    column = request.received.to(request.dtype).unsqueeze(-1)
    weights = column if request.weights is None else torch.cat([request.weights.to(request.dtype), column], dim=-1)
    return replace(request, weights=weights)


def received_from_weights(request: Request, answer: Answer) -> Answer:
    """The answer to a request that was evaluated with what keys receive as the last column of its weights."""
    if request.received is None or answer.transposed is None:
        return answer
    return replace(answer, transposed=answer.transposed[..., :-1], received=answer.transposed[..., -1])


class RefusedError(Exception):
    """A kernel cannot serve this request; the message says why."""
