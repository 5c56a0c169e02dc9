"""What a model attends to while it repeats the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.budget import ceil, check_budget
from regard.cache.policy import Entries, Policy
from regard.cache.reconstruction import Reconstruction, kept_layers
from regard.cache.when import Every, When


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keep the entries that the model looks at when it is asked to repeat the text, whatever it will be asked later:

    ``score_j = max_{h, i} P^h_ij``, over the query heads h of a group and the tokens i of the repetition, P being the softmax
    over the first tokens, the chunk that is repeated and the repetition itself.

    The text is repeated, and entries are dropped, when the block of `compress` is left: read the text inside, ask after it.
    Repeating takes passes of the model, two or three times as much work as reading; a block of `regard.watch` around sees
    these too. Of a matrix no more than a strip is stored.

    Args:
        tokenizer: of the model, for the request to repeat; its chat template tells what begins a user's turn, which stays
            and is not repeated, and what begins an answer.
        budget: entries of each head on average: a number of them, or a share of the tokens.
        across: what shares the budget: "model", the best entries of all layers and heads stay; "layer", those of all heads
            of a layer; "head", the best of each.
        chunk: how many tokens are repeated at once.
        sinks: first tokens, which stay.
        normalized: whether P is divided by the norm of what the layer was given at i, and multiplied by ‖W_o^h v_j‖ (KVzip+).

    Raises:
        ValueError: a wrong budget or setting; when it reads, padded texts, texts of which not all token ids are known or
            entries were dropped, images; a model without positions for the repetition.

    J.-H. Kim et al. (2025), KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept.", return_tensors="pt")
    >>> with torch.no_grad(), regard.compress(model, regard.cache.KVzip(tokenizer, budget=0.5)) as cache:
    ...     context = model(**inputs).past_key_values
    >>> print(f"{cache.report().kept:.2f}")
    0.50
    """

    tokenizer: Any = field(kw_only=False, repr=False)
    budget: int | float = 1.0
    across: str = "model"
    chunk: int = 2000
    sinks: int = 4
    normalized: bool = False

    def __post_init__(self) -> None:
        if not hasattr(self.tokenizer, "encode"):
            raise TypeError(f"KVzip needs the model's tokenizer first, got {self.tokenizer!r}")
        if self.across not in ("model", "layer", "head"):
            raise ValueError(f'KVzip: across must be "model", "layer" or "head", got {self.across!r}')
        for name, least in (("chunk", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"KVzip: {name} must be at least {least}, got {getattr(self, name)}")
        check_budget(self.budget, max(self.sinks, 1), "KVzip")

    @contextmanager
    def beside(self, model: Module) -> Iterator[WeakSet[Any]]:
        """The caches that are read in the block, compressed at its end."""
        caches: WeakSet[Any] = WeakSet()
        yield caches
        with torch.no_grad():
            for cache in caches:
                self._compress(model, cache)

    @property
    def when(self) -> When:
        """Every call, to find the cache; nothing is dropped then."""
        return Every(1)

    def score(self, entries: Entries) -> Tensor:
        """0 for every entry, as none is dropped before all layers are scored.

        Raises:
            ValueError: padded texts, or entries that were dropped.
        """
        if entries.text is not None and not bool(entries.text.all()):
            raise ValueError(
                "KVzip: texts of a batch must be equally long, without padding; read shorter ones by themselves"
            )
        if entries.keys.shape[2] != entries.seen:
            raise ValueError(
                f"KVzip: {entries.seen - entries.keys.shape[2]} of {entries.seen} tokens were dropped already, and what is "
                "left cannot be repeated; begin a new cache"
            )
        entries.beside.add(entries.module_call.call.place.cache)
        return torch.zeros_like(entries.received)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): every entry, until the block is left."""
        return entries.real.sum(dim=-1)

    def _compress(self, model: Module, cache: Any) -> None:
        for layer in kept_layers(cache):
            layer.settle()
        self.keep(cache, self.reconstruction.scores(model, cache))

    @property
    def reconstruction(self) -> Reconstruction:
        """How a text is repeated."""
        return Reconstruction(self.tokenizer, self.chunk, self.sinks, self.normalized)

    def keep(self, cache: Any, scores: list[Tensor]) -> None:
        """Drop the entries of a cache that have the lowest scores (batch, key heads, tokens), a tensor for each layer."""
        layers = kept_layers(cache)
        sure = scores[0].isinf().sum(dim=2)
        if self._number(layers[0].seen) < int(sure.max()):
            for layer in layers:
                layer.whole = torch.ones(len(sure), dtype=torch.bool)  # the first tokens are more than the budget
            return
        groups = [scores] if self.across == "model" else [[one] for one in scores]
        counts = [own for group in groups for own in self._counts_of(group)]
        for layer, own, number in zip(layers, scores, counts, strict=True):
            layer.keep(own, number, in_order=True)

    def _number(self, tokens: int) -> float:
        """Entries of each head on average."""
        return min(self.budget, tokens) if isinstance(self.budget, int) else self.budget * tokens

    def _counts_of(self, scores: list[Tensor]) -> list[Tensor]:
        """(batch, key heads) of each of some layers: how many entries stay of each head, where all share a budget."""
        if self.across == "head":
            number = ceil(torch.tensor(self._number(scores[0].shape[2])))
            return [number.expand(one.shape[:2]).to(one.device) for one in scores]
        every = torch.cat([one.flatten(1) for one in scores], dim=1)
        number = ceil(torch.tensor(self._number(scores[0].shape[2]) * sum(one.shape[1] for one in scores)))
        best = torch.zeros_like(every, dtype=torch.bool).scatter(1, every.topk(int(number), dim=1).indices, True)
        parts = best.split([one[0].numel() for one in scores], dim=1)
        return [part.view_as(one).sum(dim=2) for part, one in zip(parts, scores, strict=True)]
