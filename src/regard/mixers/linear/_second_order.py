"""Causal sums with weights ``1 + s + s²/2``, ``s = q·k``, in time linear in the text: what FAST and Based share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.mixers.in_turn import in_turn

CHUNK = 128


def second_order_sums(
    query: Tensor, key: Tensor, value: Tensor, before: Tensor, pairs: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """``Σ_{j≤i} (1 + s_ij + s_ij²/2) v_j``, by the weights themselves within a chunk, and by the sums of features before it.

    The features of x are 1, x, and of each pair (a, b) its product ``x_a x_b``, a square's times √½. They are made of some
    tokens at a time, whatever the length: those of a whole text would be many times as large as the text.

    Args:
        query, key: (B, H, N, D).
        value: (B, H, N, Dv); zeros for what is not to count.
        before: ``Σ φ(k) vᵀ`` of earlier tokens, (B, H, 1 + D + D (D + 1) / 2, Dv).
        pairs: (2, D (D + 1) / 2), each pair of dimensions once, in the order of the state's rows.
        chunk: tokens of a chunk; where there are more, each is computed again in the backward pass.

    Returns:
        The sums (B, H, N, Dv), and ``Σ φ(k) vᵀ`` after the last token.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    chunks = list(zip(*(tensor.split(chunk, dim=2) for tensor in (query, key, value)), strict=True))
    outputs, after = in_turn(partial(_chunk, pairs), chunks, before, before.numel())
    return torch.cat(outputs, dim=2), after


def _chunk(pairs: Tensor, tokens: tuple[Tensor, ...], before: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = tokens
    width = query.shape[3]
    scores = query @ key.mT
    inside = (1 + scores + scores.square() / 2).tril() @ value
    once, single, double = before.split([1, width, pairs.shape[1]], dim=2)
    earlier = once + query @ single + _products(query, pairs).mT @ double
    added = torch.cat([value.sum(2, keepdim=True), key.mT @ value, _products(key, pairs) @ value], dim=2)
    return inside + earlier, before + added


def _products(x: Tensor, pairs: Tensor) -> Tensor:
    """Of pairs of dimensions, (B, H, pairs, N): tokens come last, so that rows are taken and multiplied as a whole."""
    rows = x.mT.contiguous()
    first, second = pairs
    halved = torch.cat([rows, rows * 0.5**0.5], dim=2)
    return rows.index_select(2, first) * halved.index_select(
        2, torch.where(first == second, second + x.shape[3], second)
    )
