"""Sharpen or flatten attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall, stored, visible
from regard.steer.edit import Edit, Strength, check_strength, query_set, strength
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Temperature(Edit):
    """``P' = softmax(s / τ)``: below 1 a head attends to fewer keys, above 1 to more.

    All of the logits are divided, with the model's additive bias and the edits before this one.

    Args:
        by: τ, greater than 0, or a tensor of one or of one for each head of the layer, which may be learned.
        queries: only these queries; all by default.

    Raises:
        ValueError: τ not greater than 0, infinite or NaN.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q = k = torch.eye(2)[None, None]
    >>> with regard.steer(None, regard.Temperature(by=0.1)):
    ...     attention(q, k, torch.eye(2)[None, None])[0, 0, 0].round(decimals=3)
    tensor([0.9990, 0.0010])
    """

    by: Strength
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_strength(self, "by", low=0)
        if bool((torch.as_tensor(self.by) == 0).any()):
            raise ValueError("Temperature needs by to be greater than 0; to attend to one key only, Block the others")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """The scale, or queries, columns and an additive mask, over τ."""
        by, rows = strength(self, "by", call, low=1e-30), query_set(self.queries, call, heads)
        columns = tuple(
            c if c.hides else replace(c, query=torch.where(rows, c.query / by, c.query)) for c in call.columns
        )
        biased = call.attn_mask is not None and is_bias(call.attn_mask)
        sinks = call.sinks
        if sinks is not None:
            sinks = _by_row(sinks)
            sinks = torch.where(rows, sinks / by, sinks)
        if self.queries is None and rows.numel() == 1 and not biased and not isinstance(by, Tensor):
            cap = None if call.softcap is None else call.softcap / by
            return replace(call, scale=call.factor / by, softcap=cap, sinks=sinks, columns=columns)
        if call.softcap is not None:  # which is one for all rows
            return self.apply(stored(call), heads)
        if call.query.dtype in (torch.float16, torch.bfloat16):  # there the division would round
            call = call.to(torch.float32)
        mask, by = call.attn_mask, by[..., None] if isinstance(by, Tensor) else by
        if mask is not None and biased:
            mask = torch.where(rows[..., None], mask / by, mask)
        query = torch.where(rows[..., None], call.query / by, call.query)
        return replace(call, query=query, columns=columns, attn_mask=mask, sinks=sinks)


def _by_row(sinks: Tensor) -> Tensor:
    """(B|1, Hq, N|1)."""
    return sinks if sinks.ndim == 3 else sinks[None, :, None]


def is_bias(mask: Tensor) -> bool:
    """Whether an additive mask does more than to hide keys."""
    if mask.dtype == torch.bool:
        return False
    return bool(((mask != 0) & visible(mask)).any())
