"""The map of an edited call: queries and keys that carry further columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.maps.attention_map import AttentionMap


def with_columns(
    plain: AttentionMap, query: Tensor, key: Tensor, scale: float, added: float, blind: Tensor | None
) -> AttentionMap:
    """The map of the same call with columns beside its queries and keys: terms of the logits, or what hides keys.

    Args:
        plain: the map of the call without columns.
        query: (B, Hq, N, D + columns).
        key: (B, Hk, M, D + columns).
        scale: factor of the logits.
        added: the largest sum of terms, but for those that hide: beside those, the precision need not rise.
        blind: (B, Hq, N), true for queries whose every key is hidden by columns; their rows are zero.
    """
    scores = plain._scores
    mask = scores.mask
    if blind is not None and bool(blind.any()):
        sees = ~blind[..., None]
        if mask is None or mask.dtype == torch.bool:
            mask = sees if mask is None else mask & sees
        else:
            mask = torch.where(sees, mask, -torch.inf)
    view = object.__new__(AttentionMap)
    wider = replace(scores, query=query, key=key, mask=mask, scale=scale, bound=scores.limit + added)
    view._bind(wider, plain._pass.kernel)
    return view
