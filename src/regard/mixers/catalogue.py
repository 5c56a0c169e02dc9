"""Every mixer that there is, by name: its facts, its example, and how its time was measured to grow."""

from __future__ import annotations

import inspect
import json
import re
from difflib import get_close_matches
from functools import cache
from importlib import resources

from regard import mixers as package
from regard.mixers.mixer import Mixer


def mixers() -> dict[str, type[Mixer]]:
    """The mixers of this package by name.

    >>> mixers()["DeltaRule"].facts.time
    'O(N D²/H)'
    """
    found = (getattr(package, name) for name in package.__all__)
    kinds = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, Mixer) and hasattr(kind, "facts")]
    return {kind.__name__: kind for kind in sorted(kinds, key=lambda kind: kind.__name__)}


def mixer_named(name: str) -> type[Mixer]:
    """The mixer of this name, in capitals or not.

    Raises:
        ValueError: no mixer has the name; those that are near it, or whose paper's title has it, are told.

    >>> mixer_named("delta-rule").__name__
    'DeltaRule'
    """
    known = {kind.lower(): kind for kind in mixers()}
    plain = _plain(name)
    if plain not in known:
        cited = [kind for kind, mixer in mixers().items() if plain and plain in _plain(mixer.facts.paper)]
        near = cited or [known[match] for match in get_close_matches(plain, known, 1, 0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known.values()))}"
        raise ValueError(f"there is no mixer {name!r}; {hint}")
    return mixers()[known[plain]]


def _plain(text: str) -> str:
    return re.sub(r"\W|_", "", text.lower())


@cache
def exponents() -> dict[str, float]:
    """The fitted exponents of time against tokens, as ``bench/scaling.py`` last measured them on a CPU."""
    path = resources.files("regard.mixers") / "scaling.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def example(kind: type[Mixer]) -> str:
    """The lines of its docstring's example, ready to be run."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    code = [line.strip()[4:] for line in lines if line.strip().startswith((">>> ", "... "))]
    return "\n".join([f"from regard.mixers import {kind.__name__}", *code])
