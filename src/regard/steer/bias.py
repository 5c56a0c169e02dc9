"""Add to the logits of chosen keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.runtime import AttentionCall, Column
from regard.steer.edit import Edit, check_number, column, key_set, query_set, with_column
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Bias(Edit):
    """``s'_ij = s_ij + by`` for the queries i and the keys j of two sets, in nats.

    Args:
        keys: as for `Reweight`.
        by: any finite number; log α does what ``Reweight(keys, α)`` does.
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
    by: float
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_number(self, "by")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """One more column."""

        def make() -> Column:
            return column(query_set(self.queries, call, heads), float(self.by), key_set(self.keys, call), call)

        return with_column(self, call, heads, make)
