"""Whole rows of the map, for a few queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regard.runtime import Call
from regard.maps import TokenMap
from regard.watch.statistic import Statistic


class Rows(Statistic):
    """All that the queries at some positions look at: ``rows(layer, batch, head, position, key)``.

    Args:
        positions: of the queries in the text, from 0; in ``generate`` also those of tokens yet to come. A call that does
            not see a position has NaN there.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Rows([0, 4])) as seen:
    ...     _ = layer(x, x, x)
    >>> dict(seen.dataset().rows.sizes)
    {'layer': 1, 'batch': 1, 'head': 2, 'position': 2, 'key': 5}
    """

    name = "rows"
    dims = ("position", "key")

    def __init__(self, positions: Sequence[int]) -> None:
        if not positions or min(positions) < 0:
            raise ValueError(f"Rows needs positions from 0 up, got {list(positions)}")
        self.positions = list(positions)

    def measure(self, attention: TokenMap, call: Call) -> Tensor:
        """(B, H, positions, M)."""
        batch, heads, queries, keys = attention.shape
        rows = torch.full((batch, heads, len(self.positions), keys), torch.nan, dtype=attention.dtype)
        here = [
            (number, position - call.place.query_start)
            for number, position in enumerate(self.positions)
            if 0 <= position - call.place.query_start < queries
        ]
        if here:
            numbers, local = zip(*here, strict=True)
            rows[:, :, list(numbers)] = attention.rows(list(local)).cpu()
        return rows

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """The positions."""
        return {"position": self.positions}
