"""Keys of small norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries


@dataclass(frozen=True, kw_only=True)
class Knorm(BudgetPolicy):
    """Keep the keys of the smallest norm, which tend to be attended to most: ``score_j = −‖k_j‖``.

    Reads no attention, and so costs next to nothing.

    Args:
        budget, when, rest: as for every `BudgetPolicy`.

    A. Devoto et al. (2024), A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression.

    >>> import regard
    >>> print(regard.cache.Knorm(budget=0.5))
    Knorm(budget=0.5)
    """

    def score(self, entries: Entries) -> Tensor:
        """Minus the key's norm."""
        norm: Tensor = torch.linalg.vector_norm(entries.keys.float(), dim=-1)
        return -norm
