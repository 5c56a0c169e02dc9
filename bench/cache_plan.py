"""How much is measured of compressed caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.cache_families import BUDGETS, Family


@dataclass(frozen=True)
class Plan:
    """How many texts of each length, how many settings are compared on, and at which budgets."""

    lengths: Mapping[int, int]
    calibrated: int
    searched: float = 1 / 8  # the budget at which settings are compared
    budgets: Sequence[float] = BUDGETS
    budgets_of_longer: Sequence[float] = (1 / 4, 1 / 16)  # of texts longer than the shortest
    asked_before: int = 2  # questions of each of the shortest texts, which are read with the text
    facts: int = 9  # of each text, beside the needle; 4 where settings are searched
    pressed: int = 2  # texts that presses of kvpress compress
    pressed_budgets: Sequence[float] = (1 / 4,)
    sample: int = 1024  # tokens of texts from which filters and heads are found

    def budgets_of(self, family: Family, length: int) -> Sequence[float]:
        """At which budgets a policy compresses texts of a length."""
        if family.budgets is not BUDGETS:
            return family.budgets
        return self.budgets if length == self.shortest else self.budgets_of_longer

    @property
    def shortest(self) -> int:
        """The length at which settings are searched, and at which questions come before too."""
        return min(self.lengths)

    @property
    def longest(self) -> int:
        """The length at which steps are timed."""
        return max(self.lengths)


LONG = Plan({2048: 9, 4096: 3, 7500: 1}, calibrated=3)
QUICK = Plan({512: 1}, calibrated=0, budgets=(1 / 4,), facts=4, asked_before=1, pressed=1, sample=256)
