"""Maps: matrices that are never stored, what they are composed to, and the kernels that evaluate them."""

from regard.maps._columns import KeySets, Segment, Segments, indicator_columns, positions
from regard.maps.attention_map import AttentionMap
from regard.maps.concatenated_heads import ConcatenatedHeads
from regard.maps.identity import Identity
from regard.maps.mixed_heads import MixedHeads
from regard.maps.product import Product
from regard.maps.restricted import Restricted
from regard.maps.scaled import Scaled
from regard.maps.sum import Sum
from regard.maps.token_map import TokenMap, TopK, one_hot, sum_rows
from regard.maps.transposed import Transposed

__all__ = [
    "AttentionMap",
    "ConcatenatedHeads",
    "Identity",
    "KeySets",
    "MixedHeads",
    "Product",
    "Restricted",
    "Scaled",
    "Segment",
    "Segments",
    "Sum",
    "TokenMap",
    "TopK",
    "Transposed",
    "indicator_columns",
    "one_hot",
    "positions",
    "sum_rows",
]
