"""Move attention from some keys to others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regard.runtime import AttentionCall, edited_map
from regard.steer.edit import Edit, Strength, check_strength, column, hiding, key_set, query_set, strength
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Redistribute(Edit):
    """``P'_ij = (1 − share) P_ij`` on the source, ``P_ij (1 + share · m_S / m_T)`` on the target, m a query's masses.

    What a query gives to the source is taken from it by this share and given to the target, in proportion to what each
    target key has; every row keeps its sum. A query that gives the target nothing is left alone.

    Args:
        source: positions, as the keys of `Reweight`.
        target: positions; none of them in the source.
        share: from 0 to 1, or a tensor of one or of one for each head of the layer, less than 1, which may be learned.
        queries: only these queries; all by default.

    Raises:
        ValueError: a share out of range; source and target that share a key.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 4, 4)
    >>> with regard.steer(None, regard.Redistribute(source=0, target=[2, 3], share=0.5)):
    ...     attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.1250, 0.2500, 0.3125, 0.3125])
    """

    places: ClassVar[tuple[str, ...]] = ("source", "target", "queries")

    source: Where
    target: Where
    share: Strength = 1.0
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_strength(self, "share", 0, 1)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Two columns, from the masses that the edits before this one leave."""
        source, target = key_set(self.source, call), key_set(self.target, call)
        if bool((source & target).any()):
            raise ValueError(
                f"Redistribute: source and target share {int((source & target).sum())} keys of {call.place.path}"
            )
        indicators = torch.stack(torch.broadcast_tensors(source, target), dim=-1)[:, None]
        attention = edited_map(call)
        from_source, to_target = (attention @ indicators.to(attention.dtype)).unbind(-1)
        rows, share = query_set(self.queries, call, heads), strength(self, "share", call, 0, 1)
        if isinstance(share, Tensor) and bool((share == 1).any()):
            raise ValueError(
                "Redistribute needs each of several shares, or of a tensor, to be less than 1: log(1 − share) has no "
                "gradient there"
            )
        return move(call, rows, source, target, share, (from_source, to_target))


def move(
    call: AttentionCall,
    rows: Tensor,
    source: Tensor,
    target: Tensor,
    share: float | Tensor,
    mass: tuple[Tensor, Tensor],
) -> AttentionCall:
    """Take a share of what these rows give to the source and give it to the target, in proportion to what each key has.

    ``mass`` is what each row gives to either (B, H, N).
    """
    from_source, to_target = mass
    rows = rows & (to_target > 0)
    gain = torch.log1p(share * from_source / to_target.where(rows, 1.0)).where(rows, 0.0)
    if isinstance(share, Tensor):
        taken = column(rows, torch.log1p(-share), source, call)
    else:
        taken = hiding(rows, source, call) if share == 1 else column(rows, math.log1p(-share), source, call)
    return replace(call, columns=(*call.columns, taken, column(rows, gain, target, call)))
