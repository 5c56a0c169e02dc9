"""Places in an order of scores."""

from __future__ import annotations

from torch import Tensor


def ranks(scores: Tensor, dim: int = -1) -> Tensor:
    """Of each score its place along a dimension, 0 for the highest; of equals the first comes first.

    >>> import torch
    >>> ranks(torch.tensor([0.1, 0.7, 0.7, 0.3])).tolist()
    [3, 0, 1, 2]
    """
    return scores.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)
