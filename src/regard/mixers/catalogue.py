"""Every mixer that there is, by name: its facts, its example, and how its time was measured to grow."""

from __future__ import annotations

import inspect
import json
from difflib import get_close_matches
from functools import cache
from importlib import resources

from regard.mixers import linear
from regard.mixers.linear.mixer import Mixer


def mixers() -> dict[str, type[Mixer]]:
    """The mixers of this package by name.

    >>> mixers()["DeltaRule"].facts.time
    'O(N D²/H)'
    """
    found = (getattr(linear, name) for name in linear.__all__)
    kinds = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, Mixer) and hasattr(kind, "facts")]
    return {kind.__name__: kind for kind in sorted(kinds, key=lambda kind: kind.__name__)}


def mixer_named(name: str) -> type[Mixer]:
    """The mixer of this name, in capitals or not.

    Raises:
        ValueError: no mixer has the name; the nearest one is told.

    >>> mixer_named("deltarule").__name__
    'DeltaRule'
    """
    known = {kind.lower(): kind for kind in mixers()}
    plain = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    if plain not in known:
        near = get_close_matches(plain, known, 1, 0.5)
        hint = f"; did you mean {known[near[0]]}?" if near else f"; known are {', '.join(sorted(known.values()))}"
        raise ValueError(f"there is no mixer {name!r}{hint}")
    return mixers()[known[plain]]


@cache
def exponents() -> dict[str, float]:
    """The fitted exponents of time against tokens, as ``bench/scaling.py`` last measured them on a CPU."""
    path = resources.files("regard.mixers") / "scaling.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def example(kind: type[Mixer]) -> str:
    """The lines of its docstring's example, ready to be run."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    code = [line.strip()[4:] for line in lines if line.strip().startswith((">>> ", "... "))]
    return "\n".join([f"from regard.mixers.linear import {kind.__name__}", *code])
