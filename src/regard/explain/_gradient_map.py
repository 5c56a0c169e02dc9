"""The positive part of an attention matrix times its gradient, which is not stored either."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.explain._gradients import Differentiated
from regard.maps import AttentionMap, TokenMap

_ENTRIES_AT_ONCE = 2**22


class GradientMap(TokenMap):
    """``Ā = mean_h max(∇P_h ∘ P_h, 0)``, (B, 1, N, M), with ``∇P = G Vᵀ`` from the gradient G at the output ``P V``.

    It is no product of queries and keys: each question is one walk over the matrix in strips of queries.
    """

    def __init__(self, of: Differentiated) -> None:
        self._map: AttentionMap = of.call.map()
        heads = self._map.shape[1]
        value = of.call.value
        self._value = value.repeat_interleave(heads // value.shape[1], dim=1).to(self._map.dtype)
        self._gradient = of.gradient.to(self._map.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, N, M)."""
        batch, _, queries, keys = self._map.shape
        return batch, 1, queries, keys

    @property
    def dtype(self) -> torch.dtype:
        """Of the map that it is of."""
        return self._map.dtype

    @property
    def device(self) -> torch.device:
        """That of the call."""
        return self._map.device

    def heads(self, index: list[int]) -> TokenMap:
        """The one there is."""
        self._positions(index, 1, "heads", "heads")
        return self

    @property
    def _numbers(self) -> int:
        batch, heads, _, keys = self._map.shape
        return batch * heads * keys

    def _some_rows(self, index: Tensor) -> Tensor:
        rows = self._map.rows(index)
        rows = rows * (self._gradient[:, :, index] @ self._value.mT)
        return rows.clamp(min=0).mean(dim=1, keepdim=True)

    def _product(self, values: Tensor) -> Tensor:
        parts = [self._read(rows, columns) @ values.to(self.dtype) for rows, columns in self._strips()]
        return torch.cat(parts, dim=2)

    def _transposed(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.dtype)
        parts = (self._read(rows, columns).mT @ weights[:, :, rows] for rows, columns in self._strips())
        return sum(parts, start=self._new(1, 1, 1, 1))
