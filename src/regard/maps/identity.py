"""The map by which each token keeps what it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.maps.token_map import TokenMap, one_hot


class Identity(TokenMap):
    """``I``, (B, H, N, N): the residual stream as a map.

    >>> import torch
    >>> torch.equal(Identity(1, 2, 3).dense()[0, 1], torch.eye(3))
    True
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = batch, heads, tokens, tokens
        self._dtype = dtype
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, N)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self._device

    @property
    def T(self) -> TokenMap:  # noqa: N802 - the field's name for it
        """The map itself, which is symmetric."""
        return self

    def __repr__(self) -> str:
        return f"Identity(shape={self.shape})"

    def heads(self, index: list[int]) -> TokenMap:
        """As many heads, all of them alike."""
        batch, heads, tokens, _ = self.shape
        chosen = self._positions(index, heads, "heads", "heads")
        return Identity(batch, len(chosen), tokens, self.dtype, self.device)

    @property
    def _row_totals(self) -> Tensor | None:
        return torch.ones(1, 1, 1, dtype=self.dtype, device=self.device)

    @property
    def _by_columns(self) -> bool:
        return True  # either way costs the same: what it is composed with decides

    def _product(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).expand(*self.shape[:2], -1, -1)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self._product(weights)

    def _entries(self, targets: Tensor) -> Tensor:
        own = targets == torch.arange(self.shape[2], device=self.device)
        return own.to(self.dtype)[:, None].expand(self.shape[:3])

    def _some_rows(self, index: Tensor) -> Tensor:
        return one_hot(index, self.shape[3], self.dtype).expand(*self.shape[:2], -1, -1)
