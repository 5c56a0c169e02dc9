"""Put a fixed matrix in the place of a head's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, query_set
from regard.steer.temperature import is_bias
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class ReplaceMap(Edit):
    """``P'_ij = [i = j]`` ("identity"), or 1 over the number of keys that query i may see ("uniform").

    Edits of the logits that come later act on the uniform map; an identity stays what it is.

    Args:
        kind: "identity" or "uniform".
        queries: only these rows; all by default.

    Raises:
        ValueError: another kind; an identity where queries and keys are not of one text.

    The identity map is that of Perturbed-Attention Guidance, D. Ahn et al. (2024).

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v = torch.randn(3, 1, 1, 3, 4)
    >>> with regard.steer(None, regard.ReplaceMap("identity")):
    ...     bool((attention(q, k, v) == v).all())
    True
    """

    kind: Literal["identity", "uniform"]
    queries: Where | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "uniform"):
            raise ValueError(f'ReplaceMap knows the maps "identity" and "uniform", got {self.kind!r}')

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Rows of their own, or logits of 0."""
        rows = query_set(self.queries, call, heads)
        if self.kind == "identity":
            _check_self_attention(call)
            return replace(call, own=rows if call.own is None else call.own | rows)
        columns = tuple(replace(c, query=c.query.masked_fill(rows, 0.0)) for c in call.columns)
        mask = call.attn_mask
        if mask is not None and is_bias(mask):
            least = torch.finfo(mask.dtype).min / 2
            mask = torch.where(rows[..., None] & (mask > least), 0.0, mask)
        sinks = call.sinks
        if sinks is not None:
            sinks = (sinks if sinks.ndim == 3 else sinks[None, :, None]).masked_fill(rows, -torch.inf)
        query = call.query.masked_fill(rows[..., None], 0.0)
        own = None if call.own is None else call.own & ~rows
        return replace(call, query=query, columns=columns, attn_mask=mask, sinks=sinks, own=own)


def _check_self_attention(call: AttentionCall) -> None:
    first, queries, keys = call.place.query_start - call.place.key_start, call.query.shape[2], call.key.shape[2]
    if first < 0 or first + queries > keys:
        raise ValueError(
            f'ReplaceMap("identity") needs queries that are among the keys; {call.place.path} has {queries} queries from '
            f"position {call.place.query_start} on and {keys} keys from {call.place.key_start} on. Choose others with layers="
        )
