"""Strengthen, weaken or prune heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, Strength, check_strength, query_set, strength
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Gate(Edit):
    """``O' = by · P V``: the output of heads, scaled; 0 prunes them.

    Args:
        by: any finite number, or a tensor of one or of one for each head of the layer, which may be learned.
        queries: only these queries' outputs; all by default.

    Raises:
        ValueError: ``by`` infinite or NaN.

    P. Michel, O. Levy, G. Neubig (2019), Are Sixteen Heads Really Better than One?

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 2, 3, 4)
    >>> with regard.steer(None, regard.Gate(by=0, heads=1)):
    ...     attention(q, k, torch.ones(1, 2, 3, 1))[0, :, 0, 0]
    tensor([1., 0.])
    """

    by: Strength
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_strength(self, "by")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """A factor of the output, with what edits before this one added to it."""
        one = torch.ones((), dtype=torch.promote_types(call.query.dtype, torch.float32), device=call.query.device)
        gate = torch.where(query_set(self.queries, call, heads), one * strength(self, "by", call), one)
        added = None if call.added is None else call.added * gate[..., None]
        return replace(call, gate=gate if call.gate is None else call.gate * gate, added=added)
