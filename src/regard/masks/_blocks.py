"""Blocks of pairs, chosen at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """``chosen[b, h, ⌊i / query block⌋, ⌊j / key block⌋]``; see `blocks`."""

    chosen: Tensor
    block_size: tuple[int, int]

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the pair's block was chosen."""
        where = (query // self.block_size[0], key // self.block_size[1])
        batches, heads = self.chosen.shape[:2]
        if batches == 1 and heads == 1:
            return self.chosen[0, 0][where]
        if batches == 1:
            return self.chosen[0][(head, *where)]
        return self.chosen[:, 0][(batch, *where)] if heads == 1 else self.chosen[(batch, head, *where)]

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the number of blocks chosen among those that a tile meets: differences of running sums."""
        first, last = tiling.query_span(tiling.query // self.block_size[0])
        first_key, last_key = tiling.key_span(tiling.key // self.block_size[1])
        sums = torch.nn.functional.pad(self.chosen.long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        if len(sums) > 1:
            sums = sums[tiling.batch.flatten()]
        if sums.shape[1] > 1:
            sums = sums[:, tiling.head.flatten()]
        top, bottom, left, right = (t[0, 0] for t in (first, last + 1, first_key, last_key + 1))
        inside = sums[:, :, bottom, right] - sums[:, :, top, right] - sums[:, :, bottom, left] + sums[:, :, top, left]
        return known(inside > 0, inside == (bottom - top) * (right - left), certain=True)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Enough blocks, of as many batch elements and heads."""
        sizes = tuple(self.chosen.shape)
        if sizes[0] not in (1, batch) or sizes[1] not in (1, heads):
            raise ValueError(f"blocks of shape {sizes} do not broadcast to a batch of {batch} and {heads} heads")
        reach = (sizes[2] * self.block_size[0], sizes[3] * self.block_size[1])
        if queries > reach[0] or keys > reach[1]:
            raise ValueError(
                f"blocks of shape {sizes} and size {self.block_size} cover {reach[0]} queries and {reach[1]} keys, "
                f"but the call reaches {queries} and {keys}"
            )

    def __repr__(self) -> str:
        return f"blocks({int(self.chosen.sum())} of {tuple(self.chosen.shape)}, block_size={self.block_size})"


def blocks(chosen: Tensor, block_size: int | tuple[int, int]) -> Blocks:
    """Queries of a block see the keys of the blocks chosen for it.

    Args:
        chosen: boolean, (B|1, H|1, query blocks, key blocks).
        block_size: tokens of a block, one number or that of queries and that of keys.

    >>> from regard import masks
    >>> masks.blocks(torch.eye(2, dtype=torch.bool)[None, None], block_size=(1, 2)).dense(1, 1, 2, 4)[0, 0].int()
    tensor([[1, 1, 0, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if chosen.dtype != torch.bool or chosen.ndim != 4 or chosen.numel() == 0:
        raise ValueError(
            f"blocks: chosen is boolean, (B|1, H|1, query blocks, key blocks); got {chosen.dtype} {tuple(chosen.shape)}"
        )
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"blocks: a block has at least one query and one key, got {block_size!r}")
    return Blocks(chosen, sizes)
