"""Which queries see which keys: rules on positions, never matrices."""

from regard.masks.blocks import blocks
from regard.masks.causal import causal
from regard.masks.documents import documents
from regard.masks.flex import from_block_mask, from_mask_mod
from regard.masks.mask import Mask
from regard.masks.neighbourhood import neighbourhood
from regard.masks.prefix import prefix
from regard.masks.strided import fixed, strided
from regard.masks.tiles import Tiles, Tiling
from regard.masks.window import window

__all__ = [
    "Mask",
    "Tiles",
    "Tiling",
    "blocks",
    "causal",
    "documents",
    "fixed",
    "from_block_mask",
    "from_mask_mod",
    "neighbourhood",
    "prefix",
    "strided",
    "window",
]
