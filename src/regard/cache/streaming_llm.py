"""The first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries
from regard.cache.when import Every, When


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(BudgetPolicy):
    """Keep ``sinks`` first tokens and, of the rest of the budget, the most recent: ``score_j = j``, infinite for j < sinks.

    Args:
        budget, rest: as for every `BudgetPolicy`.
        sinks: first tokens to keep.
        when: at every step, as in the paper: each drops one token.

    Left out: the paper counts positions within the cache; here they go on as in the text.

    G. Xiao et al. (2024), Efficient Streaming Language Models with Attention Sinks.

    >>> import regard
    >>> print(regard.cache.StreamingLLM(budget=256, sinks=8))
    StreamingLLM(budget=256, sinks=8)
    """

    sinks: int = 4
    when: When = Every(1)

    @property
    def least(self) -> int:
        """The sinks, and the last token."""
        return self.sinks + 1

    def score(self, entries: Entries) -> Tensor:
        """The position in the text, infinite for sinks: ``score_j = j``."""
        return entries.positions.float().masked_fill(entries.sinks(self.sinks), torch.inf)
