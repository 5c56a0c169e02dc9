"""Sequence mixers: attention, and what stands in its place, each as a function, as a layer, and in a language model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regard.mixers import linear, memory, softmax
from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.layout import Layout
from regard.mixers.linear import *
from regard.mixers.memory import *
from regard.mixers.mixer import Facts, Mixer
from regard.mixers.projected import Projected
from regard.mixers.softmax import *
from regard.mixers.state import State
from regard.mixers.value_mixer import ValueMixer

__all__ = ["DynamicalSystem", "Facts", "HiddenMap", "Layout", "Mixer", "Projected", "State", "ValueMixer"]
__all__ += ["linear", "memory", "softmax"]
__all__ += linear.__all__
__all__ += memory.__all__
__all__ += softmax.__all__

if TYPE_CHECKING:
    from regard.mixers.checkpoints import load_layer as load_layer
    from regard.mixers.checkpoints import load_model as load_model
    from regard.mixers.in_place import replace_attention as replace_attention
    from regard.mixers.in_place import replace_linear_layers as replace_linear_layers
    from regard.mixers.language_model import MixerConfig as MixerConfig
    from regard.mixers.language_model import MixerLM as MixerLM

_OF_TRANSFORMERS = {
    "MixerConfig": "language_model",
    "MixerLM": "language_model",
    "load_layer": "checkpoints",
    "load_model": "checkpoints",
    "replace_attention": "in_place",
    "replace_linear_layers": "in_place",
}


def __getattr__(name: str) -> Any:
    """What needs transformers, which is imported with it and not before."""
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_OF_TRANSFORMERS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"{name} needs transformers: pip install 'regard[hf]'") from error
