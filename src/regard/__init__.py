"""Run attention, see it, steer it: attention matrices that are never stored, in any PyTorch model."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Found when first asked for, so that `regard --help` need not wait for torch; `__init__.pyi` says it to type checkers.
_PACKAGES = ("cache", "explain", "masks", "mini", "mixers", "steer", "tokens", "watch")
_PLACES = {
    "regard.cache": ("compress",),
    "regard.maps": ("AttentionMap",),
    "regard.runtime": ("AttentionCall",),
    "regard.runtime.ruled": ("attention",),
    "regard.steer": (
        "AddToKey",
        "AddToOutput",
        "AddToQuery",
        "AddToValue",
        "Bias",
        "Block",
        "Custom",
        "Edit",
        "Gate",
        "Mutual",
        "PatchMap",
        "PatchOutput",
        "Redistribute",
        "ReplaceMap",
        "Restrict",
        "Reweight",
        "SweepResult",
        "Temperature",
        "capture",
        "load_recipe",
        "log_probability",
        "logit_difference",
        "parse_edit",
        "save_recipe",
        "sweep",
    ),
    "regard.tokens": ("Grid", "locate"),
    "regard.watch": (
        "At",
        "Entropy",
        "GridDistance",
        "Mass",
        "MeanDistance",
        "Pooled",
        "Received",
        "Recording",
        "Rows",
        "Sinks",
        "Statistic",
        "TopK",
        "ValueNorm",
        "load",
    ),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [*_PACKAGES, *_PLACE]


def __getattr__(name: str) -> Any:
    """What is public, loaded when it is first asked for."""
    if name in _PACKAGES:
        return importlib.import_module(f"regard.{name}")
    if name not in _PLACE:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_PLACE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
