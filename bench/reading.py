"""Several continuations of one cache, read in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def read_apart(model: Any, cache: Any, rows: Sequence[Sequence[int]], start: int | None = None) -> list[Tensor]:
    """The logits (tokens, vocabulary) of each row, none of which sees another.

    The cache has their tokens afterwards. ``start`` is the position at which they begin, where that is not the number of
    tokens that the cache counts.
    """
    seen, number = cache.get_seq_length(), sum(map(len, rows))
    start = seen if start is None else start
    own = torch.block_diag(*(torch.ones(len(row), len(row)).tril() for row in rows)).bool()
    mask = torch.cat([torch.ones(number, seen, dtype=torch.bool), own], dim=1)
    places = torch.cat([torch.arange(start, start + len(row)) for row in rows])
    ids = torch.tensor([[token for row in rows for token in row]])
    logits: Tensor = model(
        ids, attention_mask=mask[None, None], position_ids=places[None], past_key_values=cache
    ).logits[0]
    return list(logits.split([len(row) for row in rows]))
