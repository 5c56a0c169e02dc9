"""Which queries see which keys: rules on positions, never matrices."""

from regard.masks._blocks import blocks
from regard.masks._causal import causal
from regard.masks._chosen import keys, queries
from regard.masks._documents import documents
from regard.masks._neighbourhood import neighbourhood
from regard.masks._prefix import prefix
from regard.masks._strided import fixed, strided
from regard.masks._window import window
from regard.masks.flex import from_block_mask, from_mask_mod
from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling

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
    "keys",
    "neighbourhood",
    "prefix",
    "queries",
    "strided",
    "window",
]
