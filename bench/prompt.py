"""A prompt that is read once, of which any number of policies keep what each would keep of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache

from regard.cache import KeepAll, KVzip, Policy, Reads
from regard.cache.kept_call import KeptCall
from regard.cache.layer import KeptLayer
from regard.cache.open_block import OpenBlock
from regard.cache.reconstruction import Reconstruction
from regard.runtime import AttentionCall, Entry, Proceed


class Prompt:
    """A text that a model has read, with the calls of attention by which policies go.

    `compressed` gives the cache that ``with regard.compress(model, policy): model(ids)`` leaves, without that pass. For
    decoders each of whose layers keeps keys and values of its own and hides by position alone.

    Args:
        model: a decoder of transformers.
        ids: of one text, (1, tokens).
        before: the prompt that these go on from.
    """

    def __init__(self, model: Module, ids: Tensor, before: Prompt | None = None) -> None:
        self.model = model
        self.ids: Tensor = ids if before is None else torch.cat([before.ids, ids], dim=1)
        self.cache = self._new_cache()
        if before is not None:
            for number, layer in enumerate(before.cache.layers):
                self.cache.update(layer.keys, layer.values, number)
        reading = _Calls()
        reading.enter(model)
        try:
            output = model(ids, past_key_values=self.cache, logits_to_keep=1)
        finally:
            reading.leave()
        self.logits: Tensor = output.logits[0, -1]
        self.calls = reading.calls
        if before is not None:
            self.calls = [_joined(*pair) for pair in zip(before.calls, reading.calls, strict=True)]
        self._received: dict[tuple[int, Reads], Tensor] = {}
        self._repeated: dict[Reconstruction, list[Tensor]] = {}

    def compressed(self, policy: Policy) -> Any:
        """A cache of what the policy keeps."""
        if isinstance(policy, KVzip):
            return self._zipped(policy)
        cache = self._new_cache()
        memory: dict[Any, Any] = {}
        with policy.beside(self.model) as beside:
            for number, (call, full) in enumerate(zip(self.calls, self.cache.layers, strict=True)):
                layer = cache.layers[number] = KeptLayer(number, len(self.calls), OpenBlock(is_open=False))
                layer.fill(full.keys, full.values)
                layer.new, layer.token_ids = 0, self.ids
                if policy.when.due(layer.seen, 0):
                    kept = KeptCall(policy, layer, call, layer.seen, due=True)
                    self._read(kept)
                    kept.drop(None, memory, token_ids=self.ids, beside=beside)
        return cache

    def _read(self, kept: KeptCall) -> None:
        """Have the entries receive the attention that the policy reads, found once for all policies that read the same."""
        if not kept.observed:
            return
        key, group = (kept.layer.rank, kept.reads), kept.layer.groups[0]
        if key not in self._received:
            kept.ask(kept.call.map(), kept.call)()
            self._received[key] = group.received
        group.received = self._received[key]

    def _zipped(self, policy: KVzip) -> Any:
        """What KVzip keeps; the text is repeated once for all budgets."""
        cache, how = self.compressed(KeepAll()), policy.reconstruction
        if how not in self._repeated:
            self._repeated[how] = how.scores(self.model, cache)
        policy.keep(cache, self._repeated[how])
        return cache

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)


class _Calls(Entry):
    """Takes down the calls that a model makes."""

    outermost = True  # whose calls know their cache

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def intercept(self, call: Any, proceed: Proceed, alone: bool) -> Tensor:
        self.calls.append(call)
        return proceed(call)


def _joined(first: AttentionCall, second: AttentionCall) -> AttentionCall:
    """The call of two texts one after the other, from that of the first and that of the second, which sees the first."""
    query = torch.cat([first.query, second.query], dim=2)
    return replace(second, query=query, attn_mask=None, is_causal=True)
