"""What policies keep, written out on stored matrices in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def matrix(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """The attention of the last queries to all keys, (B, Hq, N, M); ``real`` (B, M)."""
    shared = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(shared, 1).mT / math.sqrt(query.shape[-1])
    queries, keys = logits.shape[2:]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & real[:, None, None]
    return logits.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)


def of_key_heads(values: Tensor, key_heads: int) -> Tensor:
    """The mean over the query heads that share a key head, (B, Hq, …) → (B, Hk, …)."""
    return values.view(values.shape[0], key_heads, -1, *values.shape[2:]).mean(2)


def best(scores: Tensor, real: Tensor, count: Callable[[int], int]) -> Tensor:
    """(B, H, M) boolean: the entries of the highest scores, ``count(real tokens)`` of each text."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        number = count(int(real[row].sum()))
        for head in range(scores.shape[1]):
            candidates = [position for position in range(scores.shape[2]) if real[row, position]]
            candidates.sort(key=lambda position: -float(scores[row, head, position]))
            kept[row, head, candidates[:number]] = True
    return kept
