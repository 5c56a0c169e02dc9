"""A layer's budget shared among its heads by what their entries are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache.budget import Budget, budget_of, ceil
from regard.cache.ranks import ranks

if TYPE_CHECKING:
    from regard.cache.policy import Entries


@dataclass(frozen=True)
class Adaptive(Budget):
    """A layer's budget goes to the best entries of all its heads, mixed with equal shares:

    ``B_h = (1 − floor) · B*_h + floor · B``, B being the equal share of a head, and B*_h how many of the ``heads · B`` best
    entries of the layer are its own. What the policy always keeps is the best of each head. B_h is rounded down, and what
    that leaves of the budget goes to the best of the entries left.

    Args:
        budget: entries of each head, in the mean: a number of them, a share of the tokens, or the budget of a layer, such as
            ``Pyramid(0.25)``.
        floor: the part that goes to heads alike; the authors take 0.2.
        safeguard: the part of a head's equal share that its own best have for sure before heads compete. With 0.2, and
            ``floor=0``, it is kvpress's way.

    Where the scores of all heads are alike, so are their shares. Left out: the weights by which the authors' code makes
    scores of heads comparable.

    Y. Feng et al. (2024), Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference.

    Raises:
        ValueError: no number of entries and no share; a floor or safeguard that is no share from 0 to 1.

    >>> import regard
    >>> from regard.cache import Adaptive, Pyramid
    >>> print(regard.cache.SnapKV(budget=Adaptive(Pyramid(0.25), floor=0.1)))
    SnapKV(budget=Adaptive(Pyramid(0.25), floor=0.1))
    """

    budget: int | float | Budget
    floor: float = 0.2
    safeguard: float = 0.0

    def __post_init__(self) -> None:
        budget_of(self.budget, "Adaptive")
        for name in ("floor", "safeguard"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Adaptive: {name} must be a share from 0 to 1, got {getattr(self, name)!r}")

    @property
    def mean(self) -> int | float:
        """That of the budget that it shares out."""
        return budget_of(self.budget, "Adaptive").mean

    def of_layer(self, entries: Entries, least: int) -> Tensor:
        """(batch,): as the budget that it shares out has it."""
        return budget_of(self.budget, "Adaptive").of_layer(entries, least)

    def of_heads(self, shares: Tensor, scores: Tensor) -> Tensor:
        """(batch, key heads): entries by score; heads whose share is 0 take no part."""
        total, places = shares.sum(dim=1, keepdim=True), ranks(scores)
        lonely = (self.floor * shares < 1).long()  # heads that the floor leaves without an entry
        sure = ceil(shares * self.safeguard).maximum(lonely).minimum(shares)[..., None]
        competing = scores.masked_fill(places < sure, torch.inf).masked_fill(shares[..., None] == 0, -torch.inf)
        best = _among_best(competing, total)
        mixed = ((1 - self.floor) * best.double() + self.floor * shares + 1e-9).long()
        mixed = mixed.minimum((scores > -torch.inf).sum(dim=-1))
        further = competing.masked_fill(places < mixed[..., None], -torch.inf)
        return mixed + _among_best(further, total - mixed.sum(dim=1, keepdim=True))


def _among_best(scores: Tensor, number: Tensor) -> Tensor:
    """(batch, key heads): how many of the so many (batch, 1) best entries of a layer are each head's."""
    order = ranks(scores.flatten(1)).view_as(scores)
    return ((order < number[..., None]) & (scores > -torch.inf)).sum(dim=-1)
