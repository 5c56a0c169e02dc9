"""The transposed matrix."""

from __future__ import annotations

from torch import Tensor

from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class Transposed(Composed):
    """``Pᵀ``, (B, H, M, N), of a map P; ``A.T`` makes it.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> A = regard.AttentionMap(q, k)
    >>> (A.T @ torch.ones(1, 1, 50, 3)).shape
    torch.Size([1, 2, 50, 3])
    >>> A.T.topk(1).keys.shape  # for each key, the query that gives it most
    torch.Size([1, 2, 50, 1])
    """

    def __init__(self, part: TokenMap) -> None:
        super().__init__(part)
        self.part = part

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, M, N)."""
        batch, heads, queries, keys = self.part.shape
        return batch, heads, keys, queries

    @property
    def T(self) -> TokenMap:  # noqa: N802 - the field's name for it
        """The map that it is transposed from."""
        return self.part

    def heads(self, index: list[int]) -> TokenMap:
        """Those heads, transposed."""
        return self.part.heads(index).T

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return self.part._restricted(keys, rows).T

    def _product(self, values: Tensor) -> Tensor:
        return self.part._transposed(values)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self.part._product(weights)

    def _some_rows(self, index: Tensor) -> Tensor:
        return self.part._some_columns(index).mT

    def _some_columns(self, index: Tensor) -> Tensor:
        return self.part._some_rows(index).mT

    @property
    def _by_columns(self) -> bool:
        return not self.part._by_columns
