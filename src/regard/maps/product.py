"""Products of maps."""

from __future__ import annotations

from torch import Tensor

from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class Product(Composed):
    """``P Q`` of maps (B, H, N, K) and (B, H, K, M); ``A @ B`` makes it. Its products are chains of its parts' products.

    Raises:
        ValueError: maps whose shapes do not fit.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> A = regard.AttentionMap(q, k, is_causal=True)
    >>> two_steps = A @ A
    >>> two_steps.rows([49]).shape
    torch.Size([1, 2, 1, 50])
    """

    def __init__(self, left: TokenMap, right: TokenMap) -> None:
        super().__init__(left, right)
        if left.shape[:2] != right.shape[:2] or left.shape[3] != right.shape[2]:
            raise ValueError(
                "a product needs maps of one batch, of as many heads, the second with as many queries as the first has "
                f"keys; got (batch, heads, queries, keys) {left.shape} and {right.shape}"
            )
        self.left, self.right = left, right

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return *self.left.shape[:3], self.right.shape[3]

    def heads(self, index: list[int]) -> TokenMap:
        """The product of those heads."""
        return Product(self.left.heads(index), self.right.heads(index))

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return Product(self.left._restricted(rows, None), self.right._restricted(None, keys))

    @property
    def _row_totals(self) -> Tensor | None:
        return self.left._row_totals if self.right.has_probability_rows else None

    def _product(self, values: Tensor) -> Tensor:
        return self.left._product(self.right._product(values)).to(self.dtype)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self.right._transposed(self.left._transposed(weights)).to(self.dtype)

    def _some_rows(self, index: Tensor) -> Tensor:
        return self.right._transposed(self.left._some_rows(index).mT).mT.to(self.dtype)

    def _some_columns(self, index: Tensor) -> Tensor:
        return self.left._product(self.right._some_columns(index)).to(self.dtype)
