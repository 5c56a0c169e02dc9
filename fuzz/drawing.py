"""Draw cases until the time is over, and say how to have a case again."""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np
import torch

Check = Callable[[random.Random], str]
"""Draws one case from the generator, checks it, and says what the case was; raises where something is wrong."""


def seeded(check: Check, seed: int) -> str:
    """Run a check on the case of a seed, every generator of the process included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return check(random.Random(seed))


def search(name: str, checks: dict[str, Check], minutes: float, seed: int | None = None, at_most: int = 5) -> int:
    """How many checks failed, each printed with the command that repeats it; with a seed, that case alone of each check.

    Args:
        name: of the module, for the command.
        checks: by name; they take turns.
        minutes: how long to go on.
        seed: of one case to repeat.
        at_most: failures after which to stop.
    """
    end, cases, failures = time.monotonic() + 60 * minutes, 0, 0
    while failures < at_most:
        for kind, check in checks.items():
            drawn = secrets.randbits(48) if seed is None else seed
            cases += 1
            try:
                seeded(check, drawn)
            except Exception:
                failures += 1
                print(f"\n{name}, {kind}: failed\n{traceback.format_exc()}", file=sys.stderr)
                print(f"again: python -m {name} --only {kind} --seed {drawn}", file=sys.stderr)
        if seed is not None or time.monotonic() >= end:
            break
    print(f"{name}: {cases:,} cases, {failures} failed")
    return failures


def main(name: str, description: str | None, checks: dict[str, Check]) -> None:
    """The command line of one subject; exits with 1 where a check failed."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to draw cases")
    parser.add_argument("--only", nargs="*", choices=list(checks), default=list(checks), help="these checks")
    parser.add_argument("--seed", type=int, help="repeat the case of this seed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failures = search(name, {kind: checks[kind] for kind in given.only}, given.minutes, given.seed)
    sys.exit(1 if failures else 0)
