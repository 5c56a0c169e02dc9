"""Policies that go by a budget: how many entries each head of a layer keeps, whatever they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from regard.cache.policy import Entries, Policy

_PYRAMID = 20  # how much more the first layer gets than the last, of PyramidKV


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(Policy):
    """A policy that keeps the entries of the highest scores, as many of each head as the budget allows.

    Args:
        budget: entries of each head: a number of them, or a share of the tokens, above 0 and up to 1.
        prefill: compress when a prompt, or a further turn of several tokens, has been read.
        every: compress at every so many-th decoding step too; None for never.
        by_layer: "uniform"; "pyramid" for more in the first layers and less in the last at the same mean, beyond what the
            policy always keeps (Z. Cai et al., 2024, PyramidKV); or a factor of the budget for each layer.

    A text of which a share is less than the policy always keeps, such as its window, is kept whole, and the report says so.

    Raises:
        ValueError: a budget that is no number of entries and no share; a number below what the policy always keeps.
    """

    budget: int | float = field(default=1.0, kw_only=False)
    prefill: bool = True
    every: int | None = None
    by_layer: str | Sequence[float] = "uniform"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_budget(self.budget, max(self.least, 1), name)
        if self.every is not None and (isinstance(self.every, bool) or self.every < 1):
            raise ValueError(f"{name}: every must be a number of steps of at least 1, or None, got {self.every!r}")
        if isinstance(self.by_layer, str) and self.by_layer not in ("uniform", "pyramid"):
            raise ValueError(f'{name}: by_layer must be "uniform", "pyramid" or factors, got {self.by_layer!r}')

    @property
    def least(self) -> int:
        """Entries that the policy keeps whatever their scores."""
        return 0

    @property
    def reads_steps(self) -> bool:
        """Whether it compresses in decoding steps, or goes on adding up what they attend to."""
        return self.every is not None or self.accumulates

    def due(self, tokens: int, steps: int) -> bool:
        """Whether ``prefill`` asks for it after a prompt, or ``every`` at this decoding step."""
        if tokens > 1:
            return self.prefill
        return self.every is not None and steps > 0 and steps % self.every == 0

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): the layer's share of the budget, for each head."""
        return self.shares(entries)[:, None].expand(-1, entries.positions.shape[1])

    def shares(self, entries: Entries) -> Tensor:
        """(batch,): entries of each head of this layer, of all tokens at most.

        Raises:
            ValueError: factors of other layers.
        """
        tokens, whole = entries.tokens, self.keeps_whole(entries)
        share = self._of_layer(self._of_text(entries), entries).clamp(min=max(self.least, 1)).minimum(tokens)
        return share if whole is None else torch.where(whole, tokens, share)

    def keeps_whole(self, entries: Entries) -> Tensor | None:
        """(batch,), boolean: texts a share of which is less than what the policy always keeps."""
        return None if isinstance(self.budget, int) or not self.least else self._of_text(entries) < self.least

    def _of_text(self, entries: Entries) -> Tensor:
        """(batch,): the budget, as a number of entries."""
        tokens = entries.tokens
        return torch.full_like(tokens, self.budget) if isinstance(self.budget, int) else ceil(tokens * self.budget)

    def _of_layer(self, budget: Tensor, entries: Entries) -> Tensor:
        """(batch,): what a layer gets of a budget that is the mean over the layers."""
        layer, layers = entries.layer, entries.layers
        if self.by_layer == "uniform" or layers == 1:
            return budget
        if self.by_layer == "pyramid":
            further = budget - self.least  # what is always kept comes on top in every layer, as the authors have it
            most = (further * (2 - 1 / _PYRAMID)).minimum(entries.tokens - self.least)  # all tokens at most
            upper = (most - 2 * (most - further) * min(layer, layers - 1 - layer) / (layers - 1)).round().long()
            # the first layer and the last have twice the mean together, so do the second and the last but one
            return self.least + (upper if 2 * layer < layers else 2 * further - upper)
        if len(self.by_layer) != layers:
            raise ValueError(
                f"{type(self).__name__}: by_layer has {len(self.by_layer)} factors, the model {layers} layers"
            )
        return ceil(budget * float(self.by_layer[layer]))


@dataclass(frozen=True, kw_only=True)
class HeadBudgetPolicy(BudgetPolicy):
    """A policy whose scores may also share a layer's budget out among its heads.

    Args:
        budget, prefill, every, by_layer: as for every `BudgetPolicy`.
        by_head: "uniform", or "adaptive": a layer's budget goes to the best entries of all its heads, each head having a
            fifth of its share for sure (Y. Feng et al., 2024, Ada-KV). Heads then hold different numbers of entries, and the
            memory of those dropped is really freed.

    Raises:
        ValueError: as for every `BudgetPolicy`; another word for ``by_head``.
    """

    by_head: str = "uniform"

    floor: ClassVar[float] = 0.2
    """The part of its share that a head has for sure with ``by_head="adaptive"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_head not in ("uniform", "adaptive"):
            raise ValueError(f'{type(self).__name__}: by_head must be "uniform" or "adaptive", got {self.by_head!r}')

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): the layer's share of the budget for each head, or what the scores make of all of it."""
        share = super().counts(entries, scores)
        return share if self.by_head == "uniform" else self._adaptive(share, scores)

    def _adaptive(self, share: Tensor, scores: Tensor) -> Tensor:
        """A layer's budget given to the best entries of all heads, after what each has for sure."""
        sure = ceil(share * self.floor).clamp(min=max(self.least, 1)).minimum(share)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        first = scores.masked_fill(ranks < sure[..., None], math.inf).flatten(1)
        order = first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (order < share.sum(dim=1, keepdim=True)).view_as(scores).sum(dim=-1)


def check_budget(budget: object, least: int, name: str) -> None:
    """Refuse what is neither a number of entries, ``least`` of them at least, nor a share of the tokens.

    Raises:
        ValueError: so it is, with the policy's name.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"{name}: budget must be a number of entries or a share of the tokens, got {budget!r}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"{name}: a share of the tokens must be above 0 and at most 1, got {budget!r}")
    if isinstance(budget, int) and budget < least:
        raise ValueError(f"{name}: always keeps {least} entries, but the budget is {budget}")


def ceil(numbers: Tensor) -> Tensor:
    """The next whole number, except for what rounding added."""
    return (numbers.double() - 1e-9).ceil().long()
