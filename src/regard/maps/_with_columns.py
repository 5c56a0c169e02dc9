"""The map of an edited call: queries and keys that carry further columns."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.maps._scores import Scores
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

    Raises:
        ValueError: for a call with a soft cap.
    """
    scores = plain._scores
    if scores.softcap is not None:
        raise ValueError("terms of the logits cannot ride in columns beside a soft cap, which would cap them too")
    mask = scores.mask
    if blind is not None and bool(blind.any()):
        sees = ~blind[..., None]
        if mask is None or mask.dtype == torch.bool:
            mask = sees if mask is None else mask & sees
        else:
            mask = torch.where(sees, mask, -torch.inf)
    view = object.__new__(AttentionMap)
    bound = scores.limit + added
    edited = Scores(query, key, mask, scores.is_causal, scale, bound, sinks=scores.sinks)
    view._bind(edited, plain._pass.kernel)
    return view
