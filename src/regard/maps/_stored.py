"""The kernel of short calls: a matrix no larger than one strip is stored for a moment, and all is read from it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from regard.maps._request import Answer, Request
from regard.maps._scores import Scores
from regard.maps._strip import add_sinks, capped, divisor_of, finish, hide, shift
from regard.maps._strip_pass import Units

# Queries of all heads that share a key head, and numbers in the matrix: of more a strip at a time is faster.
_ROWS_AT_MOST, _NUMBERS_AT_MOST = 128, 2**19


def serves(scores: Scores, request: Request) -> bool:
    """Whether a call is short, and wants no gradient; on a GPU the fused operators are as good."""
    batch, heads, queries, keys = scores.shape
    if scores.query.device.type != "cpu" or queries * scores.groups > _ROWS_AT_MOST:
        return False
    return batch * heads * queries * keys <= _NUMBERS_AT_MOST and not (scores.requires_grad or request.requires_grad)


def answer(scores: Scores, request: Request) -> Answer:
    """Answer the request from the whole matrix. What counts here is how many operators run, not what they compute."""
    batch, heads, queries, keys = scores.shape
    units, dtype = Units.of(scores), request.dtype
    query, key = scores.query.to(dtype), scores.key.to(dtype).flatten(0, 1)
    logits = capped(query, key, units.scale, units.softcap, query.new_empty(batch, heads, queries, keys))
    starts, biases = [], []
    if scores.is_causal:
        starts, biases = [0], [_later(queries, keys, units.hidden, dtype, query.device)]
    hide(logits, scores.mask, units.hidden, starts, biases)
    sinks = units.sinks(scores, dtype)
    highest = shift(logits, sinks, units.hidden, units.to_log2) if units.shifted else None
    exps = logits.exp2()
    total = exps.sum(dim=-1)
    if sinks is not None:
        add_sinks(total, sinks, highest, units.to_log2)
    expected = mass = forward = transposed = received = blocks = distance = None
    if request.entropy:
        if units.to_log2 != 1:  # a hidden key's −inf · 0 counts as nothing
            logits.clamp_(min=-1e30)
        expected = torch.linalg.vecdot(logits, exps)
    if request.segments:
        mass = torch.stack([_sum_of_runs(exps, runs) for runs in request.segments], dim=-1)
    if request.values is not None:
        values = request.values.to(dtype).flatten(0, 1)
        forward = torch.bmm(exps.view(len(values), -1, keys), values).view(batch, heads, queries, -1)
    if request.weights is not None:
        transposed = _transposed(exps, total, request.weights.to(dtype))
    if request.received is not None:
        received = _transposed(exps, total, request.received.to(dtype).unsqueeze(-1)).squeeze(-1)
    if request.blocks is not None:
        of_queries = torch.nn.functional.one_hot(request.blocks.of_queries, request.blocks.number)
        weights = (of_queries * request.blocks.weights.unsqueeze(-1)).to(dtype)
        blocks = _transposed(exps, total, weights).mT @ request.blocks.columns.to(dtype)
    if request.distance is not None:
        apart = (
            torch.arange(queries, device=exps.device)[:, None]
            + request.distance
            - torch.arange(keys, device=exps.device)
        )
        distance = (exps * apart.abs()).sum(dim=-1).div_(divisor_of(total))
    logsumexp, entropy = finish(total, highest, expected, mass, forward, sinks, units.unit, units.to_log2)
    return Answer(logsumexp, forward, transposed, received, entropy, mass, blocks, distance)


def _transposed(exps: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """``Pᵀ W``, (B, Hq, M, W), from weights (B, Hq, N, W)."""
    weights = weights / divisor_of(total).unsqueeze(-1)
    product = torch.bmm(weights.flatten(0, 1).mT, exps.flatten(0, 1))
    return product.view(*exps.shape[:2], -1, exps.shape[3]).mT


def _sum_of_runs(exps: Tensor, runs: tuple[slice, ...]) -> Tensor:
    """(B, H, N), over some runs of neighbouring keys."""
    if len(runs) == 1:
        return exps[..., runs[0]].sum(dim=-1)
    return sum((exps[..., run].sum(dim=-1) for run in runs), exps.new_zeros(exps.shape[:-1]))


@lru_cache(maxsize=8)
def _later(queries: int, keys: int, hidden: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides the keys that follow a query in a causal call."""
    return torch.full((1, 1, queries, keys), hidden, dtype=dtype, device=device).triu_(1)
