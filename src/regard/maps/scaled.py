"""Factors of a map's heads and rows."""

from __future__ import annotations

from torch import Tensor

from regard.maps._columns import Segments
from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class Scaled(Composed):
    """``diag(f) P``: a factor for each row, or one for all rows of a head.

    ``A * f`` and ``A.scale_rows(f)`` make it; ``A.scale_keys(f)`` does from the other side.

    Args:
        part: P, (B, H, N, M).
        factors: f, (B|1, H|1, N|1).

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> A = regard.AttentionMap(q, k)
    >>> gated = A.scale_rows(torch.rand(1, 2, 50)).scale_keys(torch.rand(50)) * torch.tensor([1.0, 0.5])
    >>> gated.received().shape
    torch.Size([1, 2, 50])
    """

    def __init__(self, part: TokenMap, factors: Tensor) -> None:
        super().__init__(part)
        self.part = part
        self.factors = factors.to(part.device, part.dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return self.part.shape

    def heads(self, index: list[int]) -> TokenMap:
        """Those heads, with their factors."""
        part = self.part.heads(index)
        return Scaled(part, self.factors if self.factors.shape[1] == 1 else self.factors[:, index])

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return Scaled(self.part._restricted(rows, keys), self._of(slice(None) if rows is None else rows))

    def _of(self, rows: Tensor | slice) -> Tensor:
        """The factors of some rows."""
        return self.factors if self.factors.shape[2] == 1 else self.factors[:, :, rows]

    @property
    def _of_heads(self) -> bool:
        """Whether all rows of a head have one factor."""
        return self.factors.shape[2] == 1

    @property
    def _row_totals(self) -> Tensor | None:
        totals, factors = self.part._row_totals, self.factors.detach()
        return None if totals is None or bool((factors < 0).any()) else factors * totals

    def _product(self, values: Tensor) -> Tensor:
        return self.factors[..., None] * self.part._product(values)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self.part._transposed(self.factors[..., None] * weights)

    def _received(self, weights: Tensor | None) -> Tensor:
        return self.factors * self.part.received(weights) if self._of_heads else super()._received(weights)

    def _mass(self, segments: Segments) -> Tensor:
        return self.factors[..., None] * self.part.mass(segments)

    def _expect(self, question: str, *arguments: object) -> None:
        if question in ("product", "mass") or (question == "received" and self._of_heads):
            self.part._expect(question, *arguments)

    def _entries(self, targets: Tensor) -> Tensor:
        return self.factors * self.part._entries(targets)

    def _some_rows(self, index: Tensor) -> Tensor:
        return self._of(index)[..., None] * self.part._some_rows(index)

    def _some_columns(self, index: Tensor) -> Tensor:
        return self.factors[..., None] * self.part._some_columns(index)
