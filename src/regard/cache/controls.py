"""Policies to compare with: everything, and anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Policy
from regard.cache.when import Never, When


@dataclass(frozen=True, kw_only=True)
class KeepAll(Policy):
    """Drop nothing: ``generate`` writes what it writes without.

    >>> import regard
    >>> print(regard.cache.KeepAll())
    KeepAll()
    """

    @property
    def when(self) -> When:
        """Never: nothing is to be chosen."""
        return Never()

    def score(self, entries: Entries) -> Tensor:
        """0 for every entry: all are alike."""
        return torch.zeros_like(entries.received)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): every entry of a text."""
        return entries.real.sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Random(BudgetPolicy):
    """Keep entries at random, each layer and head its own; the same ones for the same ``seed``.

    Args:
        budget, when, rest: as for every `BudgetPolicy`.
        seed: of the choice.

    >>> import regard
    >>> print(regard.cache.Random(budget=0.5, seed=3))
    Random(budget=0.5, seed=3)
    """

    seed: int = 0

    def score(self, entries: Entries) -> Tensor:
        """Uniform noise, with an infinite score for the last token, without which nothing can be said."""
        generator = torch.Generator().manual_seed(hash((self.seed, entries.layer, entries.seen)))
        noise = torch.rand(entries.positions.shape, generator=generator).to(entries.keys.device)
        return noise.masked_fill(entries.recent(1), torch.inf)
