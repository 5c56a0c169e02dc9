"""Add to the logits of chosen keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.runtime import AttentionCall, Column
from regard.steer.edit import Edit, Strength, check_strength, column, key_set, query_set, strength, with_column
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Bias(Edit):
    """``s'_ij = s_ij + by`` for the queries i and the keys j of two sets, in nats.

    Args:
        keys: as for `Reweight`.
        by: any finite number, or a tensor of one or of one for each head of the layer, which may be learned;
            log α does what ``Reweight(keys, α)`` does.
        queries: only these queries; all by default.

    Raises:
        ValueError: ``by`` infinite or NaN.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 3, 4)
    >>> with regard.steer(None, regard.Bias(keys=slice(1, None), by=-1)):
    ...     attention(q, k, torch.eye(3, 4)[None, None])[0, 0, 0]
    tensor([0.5761, 0.2119, 0.2119, 0.0000])
    """

    keys: Where
    by: Strength
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_strength(self, "by")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """One more column."""
        by = strength(self, "by", call)

        def make() -> Column:
            return column(query_set(self.queries, call, heads), by, key_set(self.keys, call), call)

        return call.with_column(make()) if isinstance(by, Tensor) else with_column(self, call, heads, make)
