"""Sums of maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

from torch import Tensor

from regard.maps._columns import Segments
from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class Sum(Composed):
    """``P + Q + …`` of maps of one shape; ``A + B`` and ``A - B`` make it.

    A difference of two is the attention of T. Ye et al. (2024), Differential Transformer.

    Raises:
        ValueError: maps that differ in shape.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 4, 50, 16)
    >>> A = regard.AttentionMap(q, k, is_causal=True)
    >>> differential = A.heads([0, 1]) - 0.8 * A.heads([2, 3])
    >>> differential.mass({"first": [0]}).shape
    torch.Size([1, 2, 50, 1])
    """

    def __init__(self, *parts: TokenMap) -> None:
        super().__init__(*parts)
        shapes = list(dict.fromkeys(part.shape for part in parts))
        if len(shapes) > 1:
            raise ValueError(
                f"a sum needs maps of one shape (batch, heads, queries, keys), got {' and '.join(map(str, shapes))}"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return self.parts[0].shape

    def heads(self, index: list[int]) -> TokenMap:
        """The sum of those heads."""
        return Sum(*(part.heads(index) for part in self.parts))

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return Sum(*(part._restricted(rows, keys) for part in self.parts))

    @property
    def _row_totals(self) -> Tensor | None:
        totals = [part._row_totals for part in self.parts]
        known = [total for total in totals if total is not None]
        return reduce(add, known) if len(known) == len(totals) else None

    def _sum(self, answer: Callable[[TokenMap], Tensor]) -> Tensor:
        return reduce(add, (answer(part).to(self.dtype) for part in self.parts))

    def _product(self, values: Tensor) -> Tensor:
        return self._sum(lambda part: part._product(values))

    def _transposed(self, weights: Tensor) -> Tensor:
        return self._sum(lambda part: part._transposed(weights))

    def _received(self, weights: Tensor | None) -> Tensor:
        return self._sum(lambda part: part.received(weights))

    def _mass(self, segments: Segments) -> Tensor:
        return self._sum(lambda part: part.mass(segments))

    def _expect(self, question: str, *arguments: object) -> None:
        if question in ("received", "mass", "product"):  # others are read from its own products and rows
            for part in self.parts:
                part._expect(question, *arguments)

    def _entries(self, targets: Tensor) -> Tensor:
        return self._sum(lambda part: part._entries(targets))

    def _some_rows(self, index: Tensor) -> Tensor:
        return self._sum(lambda part: part._some_rows(index))

    def _some_columns(self, index: Tensor) -> Tensor:
        return self._sum(lambda part: part._some_columns(index))
