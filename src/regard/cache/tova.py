"""What the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Reads
from regard.cache.when import Every, When


@dataclass(frozen=True, kw_only=True)
class TOVA(BudgetPolicy):
    """At each step drop the tokens that the last query attends to least: ``score_j = mean_h P^h_last,j``.

    All heads of a layer keep the same tokens.

    Args:
        budget, rest: as for every `BudgetPolicy`.
        when: at every step, as in the paper.

    M. Oren et al. (2024), Transformers are Multi-State RNNs.

    >>> import regard
    >>> print(regard.cache.TOVA(budget=512))
    TOVA(budget=512)
    """

    when: When = Every(1)

    @property
    def reads(self) -> Reads:
        """The attention of the last query."""
        return Reads(1)

    def score(self, entries: Entries) -> Tensor:
        """Received attention, the mean over the layer's heads."""
        return entries.received.mean(dim=1, keepdim=True).expand_as(entries.received)
