"""Budgets: how many entries each head of a layer keeps, whatever they are worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache._part import Part

if TYPE_CHECKING:
    from regard.cache.policy import Entries


class Budget(Part, ABC):
    """How many entries each head of a layer keeps: what the layer gets, and how its heads share that."""

    @property
    @abstractmethod
    def mean(self) -> int | float:
        """A number of entries, or a share of the tokens: the mean over layers and heads."""

    @abstractmethod
    def of_layer(self, entries: Entries, least: int) -> Tensor:
        """(batch,): entries of each head of this layer, in the mean; ``least`` of them a policy keeps in any case.

        Raises:
            ValueError: a budget for other layers.
        """

    def of_heads(self, shares: Tensor, scores: Tensor) -> Tensor:
        """(batch, key heads): what becomes of ``shares`` by scores (batch, key heads, entries): they stay as they are."""
        return shares


@dataclass(frozen=True)
class Uniform(Budget):
    """The budget of a plain number or share: alike in all layers and heads.

    Args:
        budget: entries of each head: a number of them, or a share of the tokens, above 0 and up to 1.

    Raises:
        ValueError: anything else.

    >>> import regard
    >>> print(regard.cache.Uniform(0.25).mean)
    0.25
    """

    budget: int | float

    def __post_init__(self) -> None:
        check_budget(self.budget, 1, type(self).__name__)

    @property
    def mean(self) -> int | float:
        """What was given."""
        return self.budget

    def of_layer(self, entries: Entries, least: int) -> Tensor:
        """(batch,): alike in all layers."""
        return number_of(self.budget, entries.tokens)


def budget_of(given: object, name: str, least: int = 1) -> Budget:
    """A budget as an object, if it holds ``least`` entries.

    Raises:
        ValueError: neither a budget, nor a number of entries, nor a share of the tokens; too small a number.
    """
    if not isinstance(given, Budget):
        check_budget(given, least, name)
        return Uniform(given)  # type: ignore[arg-type]
    check_budget(given.mean, least, name)
    return given


def number_of(budget: int | float, tokens: Tensor) -> Tensor:
    """(batch,): a budget of texts of so many tokens, as a number of entries."""
    return torch.full_like(tokens, budget) if isinstance(budget, int) else ceil(tokens * budget)


def check_budget(budget: object, least: int, name: str) -> None:
    """Refuse what is neither a number of entries, ``least`` of them at least, nor a share of the tokens.

    Raises:
        ValueError: so it is, with the name of what was to have it.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"{name}: budget must be a number of entries or a share of the tokens, got {budget!r}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"{name}: a share of the tokens must be above 0 and at most 1, got {budget!r}")
    if isinstance(budget, int) and budget < least:
        raise ValueError(f"{name}: always keeps {least} entries, but the budget is {budget}")


def ceil(numbers: Tensor) -> Tensor:
    """The next whole number, except for what rounding added."""
    return (numbers.double() - 1e-9).ceil().long()
