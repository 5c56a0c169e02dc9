"""Keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries


@dataclass(frozen=True, kw_only=True)
class KeyDiff(BudgetPolicy):
    """Keep the keys that are least like their mean: ``score_j = −cos(k_j, mean_i k_i / ‖k_i‖)``.

    Reads no attention, and so costs next to nothing.

    Args:
        budget, when, rest: as for every `BudgetPolicy`.

    Left out: the paper reads a prompt in blocks and drops after each, so that the memory of a prompt is bounded too.

    J. Park et al. (2025), KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments.

    >>> import regard
    >>> print(regard.cache.KeyDiff(budget=0.5))
    KeyDiff(budget=0.5)
    """

    def score(self, entries: Entries) -> Tensor:
        """Minus the cosine between the key and the mean of all, each at length one."""
        keys = functional.normalize(entries.keys.float(), dim=-1)
        mean = (keys * entries.real[..., None]).sum(dim=2, keepdim=True)  # its length is nothing to a cosine
        return -functional.cosine_similarity(keys, mean, dim=-1)
