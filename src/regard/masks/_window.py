"""A band along the diagonal; with nothing beyond the query, and no end before it, the causal triangle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """``−right ≤ i − j ≤ left``; see `window`."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, reach in (("left", self.left), ("right", self.right)):
            if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 0):
                raise ValueError(f"window: {name} is a number of tokens from 0 on, or None for no end; got {reach!r}")

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is within reach of the query."""
        return self._within(query - key, query - key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the least and the largest distance in each tile."""
        first, last = tiling.query_span(tiling.query)
        first_key, last_key = tiling.key_span(tiling.key)
        least, largest = first - last_key, last - first_key
        return known(self._within(largest, least), self._within(least, largest), certain=True)

    def _within(self, from_right: Tensor, from_left: Tensor) -> Tensor:
        """Whether one distance is at least −right, and another at most left."""
        if self.left is None and self.right is None:
            return torch.ones_like(from_left, dtype=torch.bool)
        if self.left is None:
            return from_right >= -(self.right or 0)
        if self.right is None:
            return from_left <= self.left
        return (from_right >= -self.right) & (from_left <= self.left)

    @property
    def is_relative(self) -> bool:
        """True: the rule depends on how far query and key are apart."""
        return True

    def __repr__(self) -> str:
        return "causal()" if (self.left, self.right) == (None, 0) else f"window(left={self.left}, right={self.right})"


def window(left: int | None, right: int | None) -> Window:
    """Query i sees keys from ``i − left`` to ``i + right``: N·(left + 1 + right) pairs. None: to the text's begin or end.

    >>> from regard import masks
    >>> masks.window(left=1, right=0).dense(1, 1, 4, 4)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    return Window(left, right)
