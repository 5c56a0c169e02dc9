"""Policies around another one, whose scores they change."""

from __future__ import annotations

from abc import ABC
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Policy, Reads
from regard.cache.rest import Rest
from regard.cache.when import When


@dataclass(frozen=True, kw_only=True)
class Around(Policy, ABC):
    """Other scores than those of a policy, whose budget, time and rest hold."""

    pools: ClassVar[bool] = True

    policy: BudgetPolicy | Around = field(kw_only=False)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, BudgetPolicy | Around):
            raise TypeError(
                f"{type(self).__name__} goes around a policy with a budget, such as regard.cache.SnapKV(budget=0.25); got "
                f"{self.policy}"
            )

    @property
    def when(self) -> When:
        """When the policy within chooses."""
        return self.policy.when

    @property
    def rest(self) -> Rest:
        """As of the policy within."""
        return self.policy.rest

    @property
    def reads(self) -> Reads:
        """What the policy within goes by."""
        return self.policy.reads

    def beside(self, model: Module) -> AbstractContextManager[Any]:
        """What runs beside the model for the policy within."""
        return self.policy.beside(model)

    def keeps_whole(self, entries: Entries) -> Tensor | None:
        """The texts that the policy within keeps whole."""
        return self.policy.keeps_whole(entries)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """As many entries as the policy within keeps by its own scores."""
        return self.policy.counts(entries, self.inner(entries))

    def inner(self, entries: Entries) -> Tensor:
        """The scores of the policy within, −∞ for what is no entry."""
        return self.policy.score(entries).masked_fill(~entries.real, -torch.inf)
