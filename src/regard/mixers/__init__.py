"""Sequence mixers: attention, and what stands in its place."""

from regard.mixers import linear
from regard.mixers.hidden_map import HiddenMap

__all__ = ["HiddenMap", "linear"]
