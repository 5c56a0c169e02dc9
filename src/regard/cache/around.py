"""Policies around another one, whose scores they change."""

from __future__ import annotations

from abc import ABC
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.budget import BudgetPolicy
from regard.cache.policy import Entries, Policy


@dataclass(frozen=True, kw_only=True)
class Around(Policy, ABC):
    """A policy that goes by the scores and the budget of another, and compresses when it does."""

    pools: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    policy: BudgetPolicy | Around = field(kw_only=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, BudgetPolicy | Around):
            raise TypeError(
                f"{type(self).__name__} goes around a policy with a budget, such as regard.cache.SnapKV(budget=0.25); got "
                f"{self.policy}"
            )

    @property
    def reads(self) -> int | None:
        """As the policy within."""
        return self.policy.reads

    @property
    def by_query_head(self) -> bool:
        """As the policy within."""
        return self.policy.by_query_head

    @property
    def accumulates(self) -> bool:
        """As the policy within."""
        return self.policy.accumulates

    @property
    def reads_steps(self) -> bool:
        """As the policy within."""
        return self.policy.reads_steps

    @property
    def keeps_queries(self) -> int:
        """As the policy within."""
        return self.policy.keeps_queries

    def merged(self, entries: Entries, stays: Tensor) -> Tensor | None:
        """What the policy within makes of the values."""
        return self.policy.merged(entries, stays) if self.policy.merges else None

    def beside(self, model: Module) -> AbstractContextManager[Any]:
        """What runs beside the model for the policy within."""
        return self.policy.beside(model)

    def due(self, tokens: int, steps: int) -> bool:
        """When the policy within is."""
        return self.policy.due(tokens, steps)

    def keeps_whole(self, entries: Entries) -> Tensor | None:
        """The texts that the policy within keeps whole."""
        return self.policy.keeps_whole(entries)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """As many entries as the policy within keeps by its own scores."""
        return self.policy.counts(entries, self.inner(entries))

    def inner(self, entries: Entries) -> Tensor:
        """The scores of the policy within, −∞ for what is no entry."""
        return self.policy.score(entries).masked_fill(~entries.real, -torch.inf)
