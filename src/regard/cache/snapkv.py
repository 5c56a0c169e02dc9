"""What the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Reads


@dataclass(frozen=True, kw_only=True)
class SnapKV(BudgetPolicy):
    """Keep the last ``window`` tokens, and of those before them the ones that they attend to most, in clusters:

    ``score_j = mean_h pool_{|m| ≤ kernel // 2} mean_{i in window} P^h_i,j+m``, the mean over the query heads of a group.

    Args:
        budget, when, rest: as for every `BudgetPolicy`; the budget includes the window.
        window: the last tokens, whose attention is read; while decoding, what they attend to among the entries left.
        kernel: the width of the pooling, odd; 1 for none.
        pooling: "mean" or "max", of each query head.

    The defaults are the authors'. A cluster narrower than a fact loses the rest of it, such as the later digits of a number
    that is written a token each: where facts are to be found again, a ``kernel`` as wide as they are (`bench.cache_real`).

    Y. Li et al. (2024), SnapKV: LLM Knows What You are Looking for Before Generation.

    >>> import regard
    >>> print(regard.cache.SnapKV(budget=0.25))
    SnapKV(budget=0.25)
    """

    pools: ClassVar[bool] = True

    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"SnapKV: window must be at least 1 token, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"SnapKV: kernel must be odd and at least 1, got {self.kernel}")
        if self.pooling not in ("mean", "max"):
            raise ValueError(f'SnapKV: pooling must be "mean" or "max", got {self.pooling!r}')

    @property
    def least(self) -> int:
        """The tokens of the window, all of which are kept."""
        return self.window

    @property
    def reads(self) -> Reads:
        """The attention of the window; of each query head where the pooling tells them apart."""
        return Reads(self.window, by_query_head=self.pooling == "max")

    def score(self, entries: Entries) -> Tensor:
        """Received attention, pooled over neighbours; the window itself is kept."""
        window = entries.recent(self.window)
        unread = window | ~entries.real
        if self.pooling == "mean":
            received = entries.received.masked_fill(unread, 0.0)
            pooled = functional.avg_pool1d(received, self.kernel, stride=1, padding=self.kernel // 2)
        else:
            by_head = entries.received.masked_fill(unread[..., None], 0.0).mT.flatten(1, 2)
            highest = functional.max_pool1d(by_head, self.kernel, stride=1, padding=self.kernel // 2)
            pooled = highest.unflatten(1, (unread.shape[1], -1)).mean(dim=2)
        return (pooled / self.window).masked_fill(window, torch.inf)
