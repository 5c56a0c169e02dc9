"""Heads of several maps side by side."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from regard.maps._columns import Segments
from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class ConcatenatedHeads(Composed):
    """The heads of several maps, which agree in batch, queries and keys, one after another.

    Raises:
        ValueError: maps that differ in more than heads.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> A = regard.AttentionMap(q, k, is_causal=True)
    >>> ConcatenatedHeads(A, A.mean_heads()).shape
    (1, 3, 50, 50)
    """

    def __init__(self, *parts: TokenMap) -> None:
        super().__init__(*parts)
        if len({(part.shape[0], *part.shape[2:]) for part in parts}) > 1:
            shapes = " and ".join(str(part.shape) for part in parts)
            raise ValueError(f"maps whose heads are concatenated agree in batch, queries and keys; got {shapes}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, the sum of H, N, M)."""
        batch, _, queries, keys = self.parts[0].shape
        return batch, sum(self._counts), queries, keys

    @property
    def _counts(self) -> list[int]:
        return [part.shape[1] for part in self.parts]

    def heads(self, index: list[int]) -> TokenMap:
        """Those heads, in this order."""
        places = [(part, head) for part, count in zip(self.parts, self._counts, strict=True) for head in range(count)]
        chosen = [places[head] for head in self._positions(index, len(places), "heads", "heads").tolist()]
        runs = [(part, [head for _, head in run]) for part, run in groupby(chosen, key=itemgetter(0))]
        return ConcatenatedHeads(*(part.heads(run) for part, run in runs))

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return ConcatenatedHeads(*(part._restricted(rows, keys) for part in self.parts))

    @property
    def _row_totals(self) -> Tensor | None:
        totals = [part._row_totals for part in self.parts]
        known = [
            total.expand(*part.shape[:3]) for part, total in zip(self.parts, totals, strict=True) if total is not None
        ]
        return torch.cat(known, dim=1) if len(known) == len(totals) else None

    def _side_by_side(self, answer: Callable[[TokenMap], Tensor]) -> Tensor:
        return torch.cat([answer(part).to(self.dtype) for part in self.parts], dim=1)

    def _of_each(self, multiply: Callable[[TokenMap, Tensor], Tensor], columns: Tensor) -> Tensor:
        """A product of each part with its own columns."""
        if columns.shape[1] == 1:
            return self._side_by_side(lambda part: multiply(part, columns))
        own = columns.split(self._counts, dim=1)
        return torch.cat(
            [multiply(part, some).to(self.dtype) for part, some in zip(self.parts, own, strict=True)], dim=1
        )

    def _product(self, values: Tensor) -> Tensor:
        return self._of_each(lambda part, own: part._product(own), values)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self._of_each(lambda part, own: part._transposed(own), weights)

    def _mass(self, segments: Segments) -> Tensor:
        return self._side_by_side(lambda part: part.mass(segments))

    def _expect(self, question: str, *arguments: object) -> None:
        if question in ("entropy", "mass"):
            for part in self.parts:
                part._expect(question, *arguments)

    def _entropy(self) -> Tensor:
        return self._side_by_side(lambda part: part.entropy())

    def _entries(self, targets: Tensor) -> Tensor:
        return self._side_by_side(lambda part: part._entries(targets))

    def _some_rows(self, index: Tensor) -> Tensor:
        return self._side_by_side(lambda part: part._some_rows(index))

    def _some_columns(self, index: Tensor) -> Tensor:
        return self._side_by_side(lambda part: part._some_columns(index))
