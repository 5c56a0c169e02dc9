"""Policies to compare with: everything, and anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.cache.policy import Entries, Policy


@dataclass(frozen=True, kw_only=True)
class KeepAll(Policy):
    """Drop nothing: ``generate`` writes what it writes without.

    >>> import regard
    >>> print(regard.cache.KeepAll())
    KeepAll()
    """

    takes_budget: ClassVar[bool] = False

    prefill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0:
            raise ValueError(f"KeepAll drops nothing, and takes no budget; got {self.budget!r}")

    def score(self, entries: Entries) -> Tensor:
        """All alike."""
        return torch.zeros_like(entries.received)


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep entries at random, each layer and head its own; the same ones for the same ``seed``.

    Args:
        budget, prefill, every, by_layer, by_head: as for every `Policy`.
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
