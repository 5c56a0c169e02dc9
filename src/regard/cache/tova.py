"""What the last token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.cache.budget import BudgetPolicy
from regard.cache.policy import Entries


@dataclass(frozen=True, kw_only=True)
class TOVA(BudgetPolicy):
    """At each step drop the tokens that the last query attends to least: ``score_j = mean_h P^h_last,j``.

    All heads of a layer keep the same tokens.

    Args:
        budget, prefill, by_layer: as for every `BudgetPolicy`.
        every: 1, as in the paper.

    M. Oren et al. (2024), Transformers are Multi-State RNNs.

    >>> import regard
    >>> print(regard.cache.TOVA(budget=512))
    TOVA(budget=512)
    """

    every: int | None = 1

    @property
    def reads(self) -> int:
        """The last query."""
        return 1

    def score(self, entries: Entries) -> Tensor:
        """Received attention, the mean over the layer's heads."""
        return entries.received.mean(dim=1, keepdim=True).expand_as(entries.received)
