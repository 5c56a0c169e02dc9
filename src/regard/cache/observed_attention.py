"""What was attended to most so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Reads
from regard.cache.when import Every, When


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(BudgetPolicy):
    """Keep the most recent tokens and the heavy hitters, those that all queries so far attended to most:

    ``score_j = Σ_i P_ij``, over the prompt's queries and each decoding step's, the mean over the query heads of a group.

    Args:
        budget, rest: as for every `BudgetPolicy`.
        recent: the share of the budget that goes to the most recent tokens.
        average: divide by the number of queries that could see the entry, which a plain sum favours the first ones by.
        when: at every step, as in the paper.

    Z. Zhang et al. (2023), H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models.

    >>> import regard
    >>> print(regard.cache.ObservedAttention(budget=512, recent=0.25))
    ObservedAttention(budget=512, recent=0.25)
    """

    recent: float = 0.5
    average: bool = False
    when: When = Every(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise ValueError(f"ObservedAttention: recent must be a share from 0 to 1, got {self.recent!r}")

    @property
    def reads(self) -> Reads:
        """The attention of every query; the sum goes on after it has chosen."""
        return Reads(attention_of=None, accumulates=True)

    def score(self, entries: Entries) -> Tensor:
        """Received attention; the recent tokens are kept."""
        received = entries.received
        if self.average:
            received = received / (entries.tokens[:, None, None] - entries.ranks).clamp(min=1)
        recent = (self.shares(entries) * self.recent).long()
        return received.masked_fill(entries.recent(recent), torch.inf)
