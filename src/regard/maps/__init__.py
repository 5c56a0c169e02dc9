"""AttentionMap: the matrix that is never stored, and the kernels that evaluate it."""

from regard.maps._columns import Segment, Segments, positions
from regard.maps.attention_map import AttentionMap, TopK, TransposedMap

__all__ = ["AttentionMap", "Segment", "Segments", "TopK", "TransposedMap", "positions"]
