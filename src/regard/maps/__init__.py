"""AttentionMap: the matrix that is never stored, and the kernels that evaluate it."""

from regard.maps._columns import Segment, Segments, indicator_columns, positions
from regard.maps._with_columns import with_columns
from regard.maps.attention import attention
from regard.maps.attention_map import AttentionMap
from regard.maps.token_map import TokenMap, TopK, TransposedMap, one_hot, sum_rows

__all__ = [
    "AttentionMap",
    "Segment",
    "Segments",
    "TokenMap",
    "TopK",
    "TransposedMap",
    "attention",
    "indicator_columns",
    "one_hot",
    "positions",
    "sum_rows",
    "with_columns",
]
