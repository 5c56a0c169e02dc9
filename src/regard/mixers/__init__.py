"""Sequence mixers: attention, and what stands in its place, each as a function and as a layer."""

from regard.mixers import linear
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.linear import *

__all__ = ["HiddenMap", "linear"]
__all__ += linear.__all__
