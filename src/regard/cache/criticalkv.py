"""Entries by what they add to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.around import Around
from regard.cache.policy import Entries
from regard.cache.ranks import ranks


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Around):
    """Keep the best entries of another policy, and of the others those that weigh most in the layer's output:

    ``(score_j + epsilon) · mean_h ‖W_o^h v_j‖₁``, the mean over the query heads of a group.

    Args:
        policy: whose scores count, whose budget holds, and whose heads share it as it says.
        first: the share of each head's entries that goes to the policy's best, the first stage.
        epsilon: what an entry counts for whose score is 0.

    Y. Feng et al. (2025), Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective.

    >>> import regard
    >>> policy = regard.cache.CriticalKV(regard.cache.SnapKV(budget=regard.cache.Adaptive(0.5)))
    >>> policy.first
    0.5
    """

    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= 1:
            raise ValueError(f"CriticalKV: first must be a share from 0 to 1, got {self.first!r}")
        if self.epsilon < 0:
            raise ValueError(f"CriticalKV: epsilon must not be negative, got {self.epsilon!r}")

    def score(self, entries: Entries) -> Tensor:
        """Infinite for the first stage, then the policy's score times the norm of what the value adds to the output."""
        scores = self.inner(entries)
        number = (self.policy.counts(entries, scores) * self.first + 1e-9).long()
        number = number.clamp(min=1) if self.first else number
        sure = (ranks(scores) < number[..., None]) | (scores == torch.inf)
        weighed = (scores.masked_fill(sure | ~entries.real, 0.0) + self.epsilon) * self._norms(entries)
        return weighed.masked_fill(sure, torch.inf)

    def _norms(self, entries: Entries) -> Tensor:
        """(batch, key heads, entries): ``mean_h ‖W_o^h v_j‖₁``."""
        weight, heads = entries.module_call.output_weight, entries.values.shape[1]
        values = entries.values.unflatten(3, (-1, weight.shape[1]))  # of latents, those of all heads
        shared = len(weight) // heads
        norms: list[Tensor] = []
        for head, part in enumerate(weight):  # one head at a time, as what they add is as wide as the model
            own = values[:, head // shared, :, head % shared if values.shape[3] > 1 else 0]
            norms.append((own @ part.to(own.dtype)).float().abs().sum(dim=-1))
        by_key_head: Tensor = torch.stack(norms, dim=1).unflatten(1, (heads, shared)).mean(dim=2)
        return by_key_head
