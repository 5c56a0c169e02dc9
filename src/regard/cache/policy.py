"""What every cache policy has in common: how many entries each head keeps, and by which scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

_PYRAMID = 20  # how much more the first layer gets than the last, of PyramidKV


@dataclass(frozen=True)
class Entries:
    """What a policy sees of one layer of a cache when it has to choose.

    Tensors are (batch, key heads, entries), except ``keys`` and ``values`` with their width in addition. ``positions`` are
    those in the text, ``real`` tells entries from padding and empty slots, ``received`` is the attention that each was given
    by the queries that the policy reads, the mean over the query heads of a group. ``first`` (batch, 1, 1) is the
    position of each text's first real token and ``seen`` the number of tokens so far, padding included, of which this pass
    brought the last ``new``. ``memory`` is a policy's own, shared by the layers of a cache. ``token_ids`` (batch, seen) are
    the text's, None if the model was not given all of them as input_ids. ``beside`` is what `Policy.beside` gave.
    """

    layer: int
    layers: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    real: Tensor
    received: Tensor
    first: Tensor
    seen: int
    memory: dict[Any, Any]
    new: int = 0
    token_ids: Tensor | None = None
    beside: Any = None

    @property
    def tokens(self) -> Tensor:
        """(batch,): real tokens so far, dropped ones too."""
        return self.seen - self.first[:, 0, 0]

    def sinks(self, number: int) -> Tensor:
        """Boolean: the first real tokens of each text."""
        return self.real & (self.positions - self.first < number)

    def recent(self, number: int) -> Tensor:
        """Boolean: its last tokens."""
        return self.real & (self.positions >= self.seen - number)


@dataclass(frozen=True)
class Step:
    """What a policy sees of one layer in a decoding step where each head may leave all but its local entries unread.

    Shapes are of query heads by the key head that they share. ``query`` (batch, key heads, shared, width) is multiplied by
    the call's scale, ``mass`` (batch, key heads, shared) is the logarithm of Σ exp(logit) over the local entries. ``keys``
    (batch, key heads, tokens, width) are those of all tokens, ``first`` (batch,) the position of each text's first real one.
    ``state`` is what the policy remembers of the layer: tensors with a row for each text, which follow a beam search.
    """

    query: Tensor
    mass: Tensor
    keys: Tensor
    first: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A rule that scores the entries of a cache; the best ones are kept, as many as the budget allows.

    Args:
        budget: entries of each head: a number of them, or a share of the tokens, above 0 and up to 1.
        prefill: compress when a prompt, or a further turn of several tokens, has been read.
        every: compress at every so many-th decoding step too; None for never.
        by_layer: "uniform"; "pyramid" for more in the first layers and less in the last at the same mean (Z. Cai et al.,
            2024, PyramidKV); or a factor of the budget for each layer.
        by_head: "uniform", or "adaptive": a layer's budget goes to the best entries of all its heads, each head having a
            fifth of its share for sure (Y. Feng et al., 2024, Ada-KV). Heads then hold different numbers of entries, and the
            memory of those dropped is really freed.

    Raises:
        ValueError: a budget that is no number of entries and no share; one below what the policy always keeps.
    """

    budget: int | float = field(default=1.0, kw_only=False)
    prefill: bool = True
    every: int | None = None
    by_layer: str | Sequence[float] = "uniform"
    by_head: str = "uniform"

    frees: ClassVar[bool] = True
    """Whether dropped entries leave the memory."""

    takes_budget: ClassVar[bool] = True
    """Whether it drops as many entries as its budget says."""

    pools: ClassVar[bool] = False
    """Whether an entry's score depends on its neighbours', so that entries have to stay in the order of the text."""

    floor: ClassVar[float] = 0.2
    """The part of its share that a head has for sure with ``by_head="adaptive"``."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float):
            raise ValueError(
                f"{name}: budget must be a number of entries or a share of the tokens, got {self.budget!r}"
            )
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise ValueError(f"{name}: a share of the tokens must be above 0 and at most 1, got {self.budget!r}")
        if isinstance(self.budget, int) and self.budget < max(self.least, 1):
            raise ValueError(f"{name}: always keeps {max(self.least, 1)} entries, but the budget is {self.budget}")
        if self.every is not None and (isinstance(self.every, bool) or self.every < 1):
            raise ValueError(f"{name}: every must be a number of steps of at least 1, or None, got {self.every!r}")
        if isinstance(self.by_layer, str) and self.by_layer not in ("uniform", "pyramid"):
            raise ValueError(f'{name}: by_layer must be "uniform", "pyramid" or factors, got {self.by_layer!r}')
        if self.by_head not in ("uniform", "adaptive"):
            raise ValueError(f'{name}: by_head must be "uniform" or "adaptive", got {self.by_head!r}')

    @property
    def least(self) -> int:
        """Entries that the policy keeps whatever their scores."""
        return 0

    @property
    def reads(self) -> int | None:
        """Of how many last queries of each call it reads the attention; None for all, 0 for none."""
        return 0

    @property
    def accumulates(self) -> bool:
        """Whether attention read in earlier calls counts on after a compression."""
        return False

    @property
    def local(self) -> tuple[int, int] | None:
        """How many first and last tokens are local, if heads may do with these in a decoding step, as `is_local` says."""
        return None

    def is_local(self, step: Step) -> Tensor:
        """(batch, key heads, shared), boolean: the query heads that attend to their local entries only."""
        raise NotImplementedError(f"{type(self).__name__} names local entries; it needs is_local too, to say for whom")

    def beside(self, model: Module) -> AbstractContextManager[Any]:
        """What is to run beside the model in the block of `compress`, with what it gives in every `Entries`; nothing here."""
        return nullcontext()

    @abstractmethod
    def score(self, entries: Entries) -> Tensor:
        """(batch, key heads, entries), the larger the better; infinite for those that are to be kept in any case."""

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): how many entries each head keeps."""
        share = self._shares(entries)[:, None].expand(-1, entries.positions.shape[1])
        return share if self.by_head == "uniform" else self._adaptive(share, scores)

    def due(self, tokens: int, steps: int) -> bool:
        """Whether to compress after a call with this many new tokens, the ``steps``-th decoding step if it is one."""
        if tokens > 1:
            return self.prefill
        return self.every is not None and steps > 0 and steps % self.every == 0

    def _shares(self, entries: Entries) -> Tensor:
        """(batch,): entries of each head of this layer."""
        tokens = entries.tokens
        budget = torch.full_like(tokens, self.budget) if isinstance(self.budget, int) else ceil(tokens * self.budget)
        low = budget < self.least
        if bool((low & (tokens > budget)).any()):
            row = int((low & (tokens > budget)).nonzero()[0])
            raise ValueError(
                f"{type(self).__name__} always keeps {self.least} entries, but the budget, {self.budget} of "
                f"{int(tokens[row])} tokens, is {int(budget[row])}: raise it, or make the policy's window smaller"
            )
        return self._of_layer(budget, entries).clamp(min=max(self.least, 1)).minimum(tokens)

    def _of_layer(self, budget: Tensor, entries: Entries) -> Tensor:
        """(batch,): what a layer gets of a budget that is the mean over the layers."""
        layer, layers = entries.layer, entries.layers
        if self.by_layer == "uniform" or layers == 1:
            return budget
        if self.by_layer == "pyramid":
            most = (budget * (2 - 1 / _PYRAMID)).minimum(entries.tokens)  # no layer holds more than all tokens
            return ceil(most - 2 * (most - budget) * layer / (layers - 1))
        if len(self.by_layer) != layers:
            raise ValueError(
                f"{type(self).__name__}: by_layer has {len(self.by_layer)} factors, the model {layers} layers"
            )
        return ceil(budget * float(self.by_layer[layer]))

    def _adaptive(self, share: Tensor, scores: Tensor) -> Tensor:
        """A layer's budget given to the best entries of all heads, after what each has for sure."""
        sure = ceil(share * self.floor).clamp(min=max(self.least, 1)).minimum(share)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        first = scores.masked_fill(ranks < sure[..., None], math.inf).flatten(1)
        order = first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (order < share.sum(dim=1, keepdim=True)).view_as(scores).sum(dim=-1)

    def __str__(self) -> str:
        """The policy as one would write it."""
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"


def ceil(numbers: Tensor) -> Tensor:
    """The next whole number, except for what rounding added."""
    return (numbers.double() - 1e-9).ceil().long()
