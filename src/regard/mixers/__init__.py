"""Sequence mixers: attention, and what stands in its place, each as a function and as a layer."""

from regard.mixers import linear, memory, softmax
from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.linear import *
from regard.mixers.memory import *
from regard.mixers.mixer import Facts, Mixer
from regard.mixers.softmax import *
from regard.mixers.state import State

__all__ = ["DynamicalSystem", "Facts", "HiddenMap", "Mixer", "State", "linear", "memory", "softmax"]
__all__ += linear.__all__
__all__ += memory.__all__
__all__ += softmax.__all__
