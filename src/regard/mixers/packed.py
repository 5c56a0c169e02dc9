"""Texts packed one after another into one row, and the same as a batch beside padding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of one row as a batch (texts, longest, dim) with zeros after each, and which tokens are real.

    Args:
        x: (1, tokens, dim).
        cu_seqlens: (texts + 1,), where each text begins, and where the last one ends, as flash-attention counts them.

    Raises:
        ValueError: borders that do not divide the tokens into texts.

    >>> texts, real = unpack(torch.arange(5.0).view(1, 5, 1), torch.tensor([0, 2, 5]))
    >>> texts[..., 0].tolist(), real.tolist()
    ([[0.0, 1.0, 0.0], [2.0, 3.0, 4.0]], [[True, True, False], [True, True, True]])
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(
            f"cu_seqlens must be a vector of whole numbers, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    borders = cu_seqlens.tolist()
    lengths = [last - first for first, last in pairwise(borders)]
    if x.shape[0] != 1 or len(borders) < 2 or borders[0] != 0 or borders[-1] != x.shape[1] or min(lengths) < 1:
        raise ValueError(
            "packed texts come as one row of tokens, with borders cu_seqlens that rise from 0 to their number, got x of "
            f"{tuple(x.shape)} and borders {borders}"
        )
    texts = pad_sequence(x[0].split(lengths), batch_first=True)
    places = torch.arange(texts.shape[1], device=x.device)
    return texts, places < torch.tensor(lengths, device=x.device)[:, None]
