"""Whole rows of the map, for a few queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.tokens import Positions, check_form, plain
from regard.watch.statistic import Statistic


class Rows(Statistic):
    """All that the queries at some positions look at: ``rows(layer, batch, head, position, key)``.

    Args:
        positions: of the queries in the text, as for `regard.Reweight`, such as can be counted before a text is read; in
            ``generate`` also those of tokens yet to come. Negative ones count from the end of the text as far as it is known
            at a call, and later calls take the place of earlier ones. What no call sees is NaN.

    Raises:
        ValueError: positions that have no number, such as an open slice.

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

    places = ("positions",)

    def __init__(self, positions: Positions | str) -> None:
        check_form(positions, "positions")
        self.positions = positions if isinstance(positions, str) else _numbers(positions)

    def measure(self, attention: TokenMap, call: Call) -> Tensor:
        """(B, H, positions, M)."""
        batch, heads, queries, keys = attention.shape
        start, end = call.place.query_start, call.place.query_start + queries
        rows = torch.full((batch, heads, len(_numbers(self.positions)), keys), torch.nan, dtype=attention.dtype)
        wanted = [position + end if position < 0 else position for position in _numbers(self.positions)]
        here = [(number, position - start) for number, position in enumerate(wanted) if start <= position < end]
        if here:
            numbers, local = zip(*here, strict=True)
            rows[:, :, list(numbers)] = attention.rows(list(local)).cpu()
        return rows

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """The positions of the rows, as the coordinate of their dimension."""
        return {"position": self.positions}


def _numbers(positions: Positions | str) -> list[int]:
    """One after the other."""
    read = plain(positions, "positions")
    if isinstance(read, slice) and read.stop is not None and min(read.start or 0, read.stop) >= 0:
        return list(range(read.stop)[read])
    if isinstance(read, Tensor) and read.ndim == 1:
        return cast("list[int]", read.nonzero().flatten().tolist())
    if isinstance(read, list) and isinstance(read[0], int):
        return [position for position in read if isinstance(position, int)]
    raise ValueError(f"Rows needs positions that can be counted, the same for all texts, got {positions!r}")
