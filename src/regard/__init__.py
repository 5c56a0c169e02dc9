"""Run attention, see it, steer it: attention matrices that are never stored, in any PyTorch model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regard import masks, tokens
from regard.maps import AttentionMap
from regard.runtime import AttentionCall
from regard.runtime.ruled import attention
from regard.steer import (
    AddToKey,
    AddToOutput,
    AddToQuery,
    AddToValue,
    Bias,
    Block,
    Custom,
    Edit,
    Gate,
    Mutual,
    PatchMap,
    PatchOutput,
    Redistribute,
    ReplaceMap,
    Restrict,
    Reweight,
    SweepResult,
    Temperature,
    capture,
    load_recipe,
    log_probability,
    logit_difference,
    parse_edit,
    save_recipe,
    sweep,
)
from regard.tokens import Grid, locate
from regard.watch import (
    At,
    Entropy,
    Mass,
    MeanDistance,
    Pooled,
    Received,
    Recording,
    Rows,
    Sinks,
    Statistic,
    TopK,
    ValueNorm,
    load,
)

if TYPE_CHECKING:
    from regard import cache, mixers
    from regard.cache import compress
    from regard.mini._typed import mini
    from regard.steer import steer
    from regard.watch import watch
else:
    from regard import mini, steer, watch  # the packages, which are called

__version__ = "0.1.0"

__all__ = [
    "AddToKey",
    "AddToOutput",
    "AddToQuery",
    "AddToValue",
    "At",
    "AttentionCall",
    "AttentionMap",
    "Bias",
    "Block",
    "Custom",
    "Edit",
    "Entropy",
    "Gate",
    "Grid",
    "Mass",
    "MeanDistance",
    "Mutual",
    "PatchMap",
    "PatchOutput",
    "Pooled",
    "Received",
    "Recording",
    "Redistribute",
    "ReplaceMap",
    "Restrict",
    "Reweight",
    "Rows",
    "Sinks",
    "Statistic",
    "SweepResult",
    "Temperature",
    "TopK",
    "ValueNorm",
    "attention",
    "cache",
    "capture",
    "compress",
    "load",
    "load_recipe",
    "locate",
    "log_probability",
    "logit_difference",
    "masks",
    "mini",
    "mixers",
    "parse_edit",
    "save_recipe",
    "steer",
    "sweep",
    "tokens",
    "watch",
]


def __getattr__(name: str) -> Any:
    """What is loaded when it is first asked for: the methods of papers."""
    if name in ("cache", "mixers"):
        return importlib.import_module(f"regard.{name}")
    if name == "compress":
        return importlib.import_module("regard.cache").compress
    raise AttributeError(f"module 'regard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
