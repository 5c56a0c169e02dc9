"""Hide keys from queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.runtime import AttentionCall, Column
from regard.steer.edit import Edit, hiding, key_set, query_set, with_column
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Block(Edit):
    """``s'_ij = −∞`` for the queries i and the keys j of two sets: an attention knockout.

    Args:
        keys: as for `Reweight`.
        queries: these queries do not see the keys; all by default. A query that is left with no key gets zeros.

    The knockout is that of M. Geva et al. (2023), Dissecting Recall of Factual Associations in Auto-Regressive Language
    Models.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 3, 4)
    >>> with regard.steer(None, regard.Block(keys=[0], queries=[2])):
    ...     attention(q, k, torch.eye(3, 4)[None, None])[0, 0, 1:]
    tensor([[0.3333, 0.3333, 0.3333, 0.0000],
            [0.0000, 0.5000, 0.5000, 0.0000]])
    """

    keys: Where
    queries: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """One more hiding column."""

        def make() -> Column:
            return hiding(query_set(self.queries, call, heads), key_set(self.keys, call), call)

        return with_column(self, call, heads, make)
