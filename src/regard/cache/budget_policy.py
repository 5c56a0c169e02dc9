"""Policies that keep the entries of the highest scores, as many as a budget allows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.cache.budget import Budget, budget_of, number_of
from regard.cache.policy import Entries, Policy
from regard.cache.rest import Drop, Rest
from regard.cache.when import AfterPrompt, When


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(Policy):
    """A policy that keeps the entries of the highest scores, as many of each head as the budget allows.

    Args:
        budget: entries of each head: a number of them, a share of the tokens above 0 and up to 1, or an object that says what
            each layer and head gets: `Pyramid`, `ByLayer`, `Adaptive`.
        when: `AfterPrompt`, or `Every` so many decoding steps.
        rest: what becomes of the entries that it does not keep: `Drop`, or `Merge`.

    A text of which a share is less than the policy always keeps, such as its window, is kept whole, and the report says so.

    Raises:
        ValueError: a budget that is no number of entries and no share; a number below what the policy always keeps.
    """

    budget: int | float | Budget = field(default=1.0, kw_only=False)
    when: When = AfterPrompt()
    rest: Rest = Drop()

    def __post_init__(self) -> None:
        name = type(self).__name__
        budget_of(self.budget, name, max(self.least, 1))
        for slot, kind, example in (("when", When, "AfterPrompt() or Every(16)"), ("rest", Rest, "Drop() or Merge()")):
            if not isinstance(getattr(self, slot), kind):
                raise ValueError(f"{name}: {slot} must be such as {example}, got {getattr(self, slot)!r}")

    @property
    def least(self) -> int:
        """Entries that the policy keeps whatever their scores."""
        return 0

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): the layer's share of the budget, as its heads share it."""
        return self.of_heads(self.shares(entries)[:, None].expand(-1, scores.shape[1]), scores)

    def shares(self, entries: Entries) -> Tensor:
        """(batch,): entries of each head of this layer in the mean, of all tokens at most.

        Raises:
            ValueError: factors of other layers.
        """
        tokens, whole = entries.tokens, self.keeps_whole(entries)
        share = self._budget.of_layer(entries, self.least).clamp(min=max(self.least, 1)).minimum(tokens)
        return share if whole is None else torch.where(whole, tokens, share)

    def of_heads(self, shares: Tensor, scores: Tensor) -> Tensor:
        """(batch, key heads): what the budget makes of equal shares; heads whose share is 0 take no part."""
        return self._budget.of_heads(shares, scores)

    def keeps_whole(self, entries: Entries) -> Tensor | None:
        """(batch,), boolean: texts a share of which is less than what the policy always keeps."""
        mean = self._budget.mean
        return None if isinstance(mean, int) or not self.least else number_of(mean, entries.tokens) < self.least

    @property
    def _budget(self) -> Budget:
        return budget_of(self.budget, type(self).__name__)
