"""The two patterns of sparse transformers: every so many tokens back, and summaries at fixed places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Mask):
    """``0 ≤ i − j ≤ stride``, or ``i − j`` a multiple of the stride; see `strided`."""

    stride: int

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"strided: the stride is 1 or more, got {self.stride}")

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is near, or a whole number of strides back."""
        distance = query - key
        return (distance >= 0) & ((distance <= self.stride) | (distance % self.stride == 0))

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the least and the largest distance in each tile."""
        first, last = tiling.query_span(tiling.query)
        first_key, last_key = tiling.key_span(tiling.key)
        least, largest = (first - last_key).clamp(min=0), last - first_key
        multiple = largest // self.stride * self.stride  # the last one that is not beyond
        seen = (largest >= 0) & ((least <= self.stride) | (multiple >= least))
        whole = (least == largest) & (largest % self.stride == 0)
        full = first >= last_key
        if self.stride > 1:
            full = full & ((largest <= self.stride) | whole)
        return known(seen, full, certain=True)

    @property
    def is_relative(self) -> bool:
        """True: the rule depends on how far query and key are apart."""
        return True

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Mask):
    """Keys of the query's own block, and the last ``summary`` ones of each block before; see `fixed`."""

    stride: int
    summary: int

    def __post_init__(self) -> None:
        if not 1 <= self.summary <= self.stride:
            raise ValueError(f"fixed: summary is from 1 to the stride ({self.stride}), got {self.summary}")

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is in the query's block or a summary, and not after it."""
        block, place = key // self.stride, key % self.stride
        return (key <= query) & ((block == query // self.stride) | (place >= self.stride - self.summary))

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the first and last block and token of each tile."""
        first, last = tiling.query_span(tiling.query)
        first_key, last_key = tiling.key_span(tiling.key)
        block, last_block = first // self.stride, last // self.stride
        key_block, reach = first_key // self.stride, torch.minimum(last_key, last)
        near = (block <= reach // self.stride) & (key_block <= last_block)
        from_summary = first_key % self.stride >= self.stride - self.summary
        summarised = from_summary | (key_block * self.stride + self.stride - self.summary <= reach)
        # All pairs are seen where keys before the queries' one block are the end of a block, and so summaries.
        ends = from_summary & (
            (key_block == last_key // self.stride) | ((key_block == block - 1) & (block == last_block))
        )
        own = (block == last_block) & (key_block == block)
        every = ends | own
        full = (last_key <= first) & (torch.ones_like(every) if self.summary == self.stride else every)
        return known((first_key <= last) & (near | summarised), full, certain=True)

    def __repr__(self) -> str:
        return f"fixed({self.stride}, summary={self.summary})"


def strided(stride: int) -> Strided:
    """Query i sees the ``stride`` keys before it, itself, and every ``stride``-th key back: Child, Gray, Radford and
    Sutskever, "Generating Long Sequences with Sparse Transformers" (2019), both heads of the strided pattern in one.

    Its local half alone is ``window(left=stride, right=0)``.

    >>> from regard import masks
    >>> masks.strided(2).dense(1, 1, 6, 6)[0, 0, 5].int()
    tensor([0, 1, 0, 1, 1, 1], dtype=torch.int32)
    """
    return Strided(stride)


def fixed(stride: int, summary: int = 1) -> Fixed:
    """Query i sees keys j ≤ i of its block of ``stride`` tokens, and the last ``summary`` of every block: Child, Gray,
    Radford and Sutskever, "Generating Long Sequences with Sparse Transformers" (2019), both heads of the fixed pattern in
    one.

    >>> from regard import masks
    >>> masks.fixed(3, summary=1).dense(1, 1, 8, 8)[0, 0, 7].int()
    tensor([0, 0, 1, 0, 0, 1, 1, 1], dtype=torch.int32)
    """
    return Fixed(stride, summary)
