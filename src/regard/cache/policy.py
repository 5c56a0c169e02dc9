"""What every cache policy has in common: it scores the entries of a layer, and says how many of each head stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Module

from regard.cache._part import Part
from regard.cache.module_call import ModuleCall
from regard.cache.rest import Drop, Rest
from regard.cache.when import AfterPrompt, When


@dataclass(frozen=True)
class Entries:
    """What a policy sees of one layer of a cache when it has to choose.

    Tensors are (batch, key heads, entries), except ``keys`` and ``values`` with their width in addition. ``positions`` are
    those in the text, ``real`` tells entries from padding and empty slots, ``received`` is the attention that each was given
    by the queries that the policy reads, the mean over the query heads of a group, or with those in a last dimension where
    it says so. ``text`` (batch, seen) tells the real tokens so far from padding, None if there is none; this pass brought
    the last ``new`` of ``seen``. ``memory`` is a policy's own, shared by the layers of a cache. ``token_ids`` (batch, seen)
    are the text's, None if the model was not given all of them as input_ids. ``beside`` is what `Policy.beside` gave.
    ``module_call`` has the queries, hidden states and projections of the model's layer, for policies that ask.

    Where a model caches latents that it expands to the keys and values of its heads (DeepSeek's MLA), there is one key
    head, an entry of which has the keys and values of all heads, one after the other.
    """

    layer: int
    layers: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    real: Tensor
    received: Tensor
    text: Tensor | None
    seen: int
    memory: dict[Any, Any]
    new: int = 0
    token_ids: Tensor | None = None
    beside: Any = None
    made_by: ModuleCall | None = None

    @property
    def module_call(self) -> ModuleCall:
        """What the model's layer was given and made: its queries, hidden states, projections and rotations."""
        if self.made_by is None:
            raise ValueError("these entries were not made by a model's layer")
        return self.made_by

    @cached_property
    def tokens(self) -> Tensor:
        """(batch,): real tokens so far, dropped ones too."""
        if self.text is None:
            return self.positions.new_full((self.positions.shape[0],), self.seen)
        return self.text.sum(dim=1)

    @cached_property
    def ranks(self) -> Tensor:
        """(batch, key heads, entries): how many real tokens of its text stand before each entry."""
        if self.text is None:
            return self.positions
        before = self.text.long().cumsum(dim=1) - 1
        index = self.positions.clamp(min=0)
        return before[:, None].expand(-1, index.shape[1], -1).gather(2, index)

    def sinks(self, number: int) -> Tensor:
        """Boolean: the first real tokens of each text."""
        return self.real & (self.ranks < number)

    def recent(self, number: int | Tensor) -> Tensor:
        """Boolean: its last real tokens, so many of each text or (batch,) of each its own number."""
        if self.text is None and isinstance(number, int):
            return self.real & (self.positions >= self.seen - number)
        return self.real & (self.ranks >= (self.tokens - number)[:, None, None])


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


@dataclass(frozen=True)
class Reads:
    """What of the model's queries a policy goes by.

    Args:
        attention_of: of how many last queries of a text it reads the attention; None for all since it last read, 0 for none.
        by_query_head: whether it reads what each query head attends to, instead of the mean over those that share a key head.
        accumulates: whether attention that was read in earlier calls counts on after it has chosen.
        queries: how many last queries of a text it wants to find in ``entries.module_call`` while decoding.
    """

    attention_of: int | None = 0
    by_query_head: bool = False
    accumulates: bool = False
    queries: int = 0


@dataclass(frozen=True, kw_only=True)
class Policy(Part, ABC):
    """A rule that scores the entries of a cache and says how many of each head stay: those of the highest scores.

    One that goes by a budget of entries is a `BudgetPolicy`.
    """

    pools: ClassVar[bool] = False
    """Whether an entry's score depends on its neighbours', so that entries have to stay in the order of the text."""

    @property
    def when(self) -> When:
        """The calls after which it chooses."""
        return AfterPrompt()

    @property
    def rest(self) -> Rest:
        """What becomes of the entries that it does not keep."""
        return Drop()

    @property
    def reads(self) -> Reads:
        """What its score goes by."""
        return Reads()

    @property
    def reads_in_all(self) -> Reads:
        """What its score goes by, and what becomes of the rest."""
        reads = self.reads
        return reads if reads.attention_of != 0 else replace(reads, attention_of=self.rest.reads)

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

    @abstractmethod
    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): how many entries each head keeps."""

    def keeps_whole(self, entries: Entries) -> Tensor | None:
        """(batch,), boolean: texts that it keeps whole since they are too short for it; None if it knows none such."""
        return None
