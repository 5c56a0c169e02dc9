"""Multiply the attention to chosen keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from regard.runtime import AttentionCall, Column, Factor
from regard.steer.edit import Edit, Strength, check_strength, column, hiding, key_set, query_set, strength, with_column
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Reweight(Edit):
    """``P'_ij = α P_ij / Σ_j' P_ij' α^[j' ∈ keys]`` for the keys j of a set, the others ``P_ij`` over the same sum.

    Renormalised, it is a term log α of the logits, and α = 0 hides the keys: a query that sees no other gets zeros. Without,
    the entries are multiplied after the softmax and rows need not sum to 1; such factors come after all edits of the logits.

    Args:
        keys: positions (one, several, a slice, a boolean mask (tokens,) or (batch, tokens)), or a function of the token ids
            that returns such a mask; in ``generate`` they are those of the whole text.
        by: α, at least 0, or a tensor of one or of one for each head of the layer, which may be learned; renormalised it
            has to be greater than 0.
        queries: only these queries; all by default.
        renormalize: divide each row by its new sum.

    Raises:
        ValueError: α negative, infinite or NaN.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 3, 4)
    >>> with regard.steer(None, regard.Reweight(keys=0, by=2)):
    ...     attention(q, k, torch.eye(3, 4)[None, None])[0, 0, 0]
    tensor([0.5000, 0.2500, 0.2500, 0.0000])
    """

    keys: Where
    by: Strength
    queries: Where | None = None
    renormalize: bool = True

    def __post_init__(self) -> None:
        check_strength(self, "by", low=0)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """One more column, or factor."""
        by = strength(self, "by", call, low=0)
        if not self.renormalize:
            keys, queries = key_set(self.keys, call), query_set(self.queries, call, heads)
            return replace(call, factors=(*call.factors, Factor(queries, keys, by)))
        if isinstance(by, Tensor):
            return call.with_column(self._learned(by, call, heads))

        def make() -> Column:
            keys, queries = key_set(self.keys, call), query_set(self.queries, call, heads)
            return column(queries, math.log(by), keys, call) if by else hiding(queries, keys, call)

        return with_column(self, call, heads, make)

    def _learned(self, by: Tensor, call: AttentionCall, heads: Tensor) -> Column:
        if bool((by == 0).any()):
            raise ValueError(
                "Reweight needs each of several by, or of a tensor, to be greater than 0, where it has a logarithm; "
                "Block hides keys"
            )
        return column(query_set(self.queries, call, heads), by.log(), key_set(self.keys, call), call)
