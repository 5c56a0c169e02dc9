"""Masks from FlexAttention's functions and block masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.masks._blocks import blocks
from regard.masks.mask import Mask, MaskMod
from regard.masks.tiles import Tiles, Tiling

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False, repr=False)
class FromMaskMod(Mask):
    """A rule of which nothing is known but its answers; see `from_mask_mod`."""

    function: MaskMod

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """What the function says."""
        view = self.function(batch, head, query, key)
        if not isinstance(view, Tensor) or view.dtype != torch.bool:
            found = view.dtype if isinstance(view, Tensor) else type(view).__name__
            raise TypeError(f"a mask_mod returns a boolean tensor, but {_name(self.function)} returned {found}")
        return view

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """Nothing is known of any tile; they are looked into one by one."""
        pair = self.visible(tiling.batch, tiling.head, tiling.query[..., :1, :1], tiling.key[..., :1, :1])
        depends = torch.broadcast_shapes(pair.shape, (1, 1, 1, 1))[:2]
        unknown = torch.ones(*depends, tiling.query.shape[2], tiling.key.shape[2], device=pair.device, dtype=torch.bool)
        return Tiles(unknown, unknown, ~unknown)

    def __repr__(self) -> str:
        return f"from_mask_mod({_name(self.function)})"


def _name(function: MaskMod) -> str:
    return getattr(function, "__qualname__", repr(function))


def from_mask_mod(function: MaskMod) -> FromMaskMod:
    """The mask of a FlexAttention ``mask_mod``, a function of (batch, head, query, key) positions.

    It is called with tensors that broadcast against each other, and so made of pointwise operators and look-ups, as
    FlexAttention's compiler demands too. Its tiles are found by evaluating it, tile by tile.

    >>> from regard import masks
    >>> def every_second_key(batch, head, query, key):
    ...     return key % 2 == 0
    >>> masks.from_mask_mod(every_second_key) & masks.causal()
    from_mask_mod(every_second_key) & causal()
    """
    return FromMaskMod(function)


def from_block_mask(block_mask: BlockMask) -> Mask:
    """The mask of a FlexAttention ``BlockMask``: its full blocks, and what its ``mask_mod`` shows in its partial ones.

    >>> from regard import masks
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> block_mask = create_block_mask(masks.window(100, 0).mask_mod, None, None, 1024, 1024, device="cpu")
    >>> bool((masks.from_block_mask(block_mask).dense(1, 1, 9, 9) == masks.causal().dense(1, 1, 9, 9)).all())
    True
    """
    partial = _in_place(block_mask.kv_num_blocks, block_mask.kv_indices)
    mask: Mask = blocks(partial, block_mask.BLOCK_SIZE) & from_mask_mod(block_mask.mask_mod)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        return mask
    full = _in_place(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return mask | blocks(full, block_mask.BLOCK_SIZE)


def _in_place(numbers: Tensor, columns: Tensor) -> Tensor:
    """Which blocks there are, (B, H, query blocks, key blocks), from the number in each row and their columns."""
    listed = torch.arange(columns.shape[-1], device=columns.device) < numbers.unsqueeze(-1)
    return torch.zeros_like(listed).scatter(-1, columns.long(), listed)
