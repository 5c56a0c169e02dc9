"""One attention call over the entries that are left of its cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import AttentionCall, run

if TYPE_CHECKING:
    from regard.cache.head_group import HeadGroup
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Policy


class KeptCall:
    """A call of a layer whose entries are kept; ``tokens`` of its keys are new."""

    def __init__(self, policy: Policy, layer: KeptLayer, call: AttentionCall, tokens: int) -> None:
        if call.rule is not None:
            raise NotImplementedError(
                f"compress cannot drop entries of {call.place.path}, which attends under a rule; give it "
                "attn_mask=rule.dense(…)"
            )
        self.policy = policy
        self.layer = layer
        self.call = call
        self.tokens = tokens
        reads = tokens if policy.reads is None else min(policy.reads, tokens)
        # of how many last queries the attention is read
        self.observed = reads if tokens > 1 or policy.reads_steps else 0
        if self.observed == policy.reads != 0 and not policy.accumulates:
            layer.forget()  # what earlier queries attended to: these are all that the policy reads

    @property
    def is_whole(self) -> bool:
        """Whether the call, as the model made it, is on all that the cache is to be read for."""
        return not self.layer.dropped

    @functools.cached_property
    def real(self) -> Tensor | None:
        """(B, tokens so far): real tokens, as far as the last query may see them; None for all."""
        mask = self._mask()
        if mask is None:
            return None
        return _visible(mask[:, 0, -1]).expand(self.call.query.shape[0], -1)

    def restore(self) -> AttentionCall:
        """The call on a key for every token so far; those that are gone are zeros, and masked."""
        batch, _, tokens, _ = self.call.query.shape
        groups, seen = self.layer.groups, self.layer.seen
        heads = sum(len(group.heads) for group in groups)
        key, value = (
            groups[0].keys.new_zeros(batch, heads, seen + 1, t.shape[3]) for t in (groups[0].keys, groups[0].values)
        )
        left = torch.zeros(batch, heads, seen + 1, dtype=torch.bool, device=key.device)
        for group in groups:
            index = group.all_positions()
            index = torch.where(index < 0, seen, index)  # empty slots go to the end, which is cut off
            for full, own in (
                (key, group.keys),
                (value, group.values),
                (left, torch.ones_like(index, dtype=torch.bool)),
            ):
                wide = index if own.ndim == 3 else index[..., None].expand_as(own)
                full[:, group.heads] = full[:, group.heads].scatter(2, wide, own)
        shared = self.call.query.shape[1] // heads
        left = left[:, :, None, :seen].repeat_interleave(shared, dim=1)
        mask = self._mask()
        if mask is None:
            mask = left & torch.ones(tokens, seen, dtype=torch.bool, device=key.device).tril(seen - tokens)
        else:
            mask = mask & left if mask.dtype == torch.bool else mask.masked_fill(~left, -math.inf)
        return replace(
            self.call, key=key[:, :, :seen], value=value[:, :, :seen], attn_mask=mask, is_causal=False, enable_gqa=True
        )

    def ask(self, attention: TokenMap, last: AttentionCall) -> Callable[[], None]:
        """Have it read what the entries receive, where the policy wants that."""
        if self.observed == self.tokens > 1:
            attention.expect("received", *self._weights)
        return functools.partial(self._take, attention)

    def _take(self, attention: TokenMap) -> None:
        received = self._received(attention)
        for group in self.layer.groups:
            positions = group.all_positions()
            own = received[:, group.heads].gather(2, positions.clamp(min=0))
            group.receive(own.masked_fill(positions < 0, 0.0))

    def attend(self) -> Tensor:
        """The output, (B, Hq, N, D), over the entries that are left."""
        groups = self.layer.groups
        outputs = [self._attend(group) for group in groups]
        if len(groups) == 1:
            return outputs[0]
        output = outputs[0].new_empty(*self.call.query.shape[:3], outputs[0].shape[-1])
        for group, part in zip(groups, outputs, strict=True):
            output[:, self._query_heads(group)] = part
        return output

    def _attend(self, group: HeadGroup) -> Tensor:
        query = self.call.query if len(self.layer.groups) == 1 else self.call.query[:, self._query_heads(group)]
        mask = self._mask_of(group, query.shape[1])
        plain = self.call.softcap is None and self.call.sinks is None
        if self.observed and self.tokens == 1 and plain:
            return self._step(group, query, mask)
        own = replace(
            self.call, query=query, key=group.keys, value=group.values, attn_mask=mask, is_causal=False,
            scale=self.call.factor, enable_gqa=query.shape[1] > len(group.heads), sinks=self._sinks_of(group),
        )  # fmt: skip
        if self.observed:
            with torch.no_grad():
                group.receive(self._received(own.map()))
        return run(own)

    def _step(self, group: HeadGroup, query: Tensor, mask: Tensor | None) -> Tensor:
        """One query, whose small matrix is at hand."""
        batch, heads, _, width = query.shape
        shared = heads // len(group.heads)
        logits = (query.view(batch, -1, shared, width) @ group.keys.mT).float() * self.call.factor
        if mask is not None:
            mask = mask.expand(-1, heads, -1, -1).reshape(mask.shape[0], -1, shared, group.length)
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        matrix = logits.softmax(dim=-1).nan_to_num(0.0)
        group.receive(matrix.detach().mean(dim=2))
        return (matrix.to(group.values.dtype) @ group.values).view(batch, heads, 1, -1)

    def _received(self, attention: TokenMap) -> Tensor:
        """(B, Hk, keys): what the keys receive from the queries that are read, the mean over the heads of a group."""
        if self.observed == self.tokens > 1:
            received = attention.received(*self._weights)
        else:
            rows = attention.rows(slice(self.tokens - self.observed, self.tokens))
            for weights in self._weights:
                rows = rows * weights[:, :, -self.observed :, None]
            received = rows.sum(dim=2)
        key_heads = received.shape[1] * self._key_heads // self.call.query.shape[1]
        return received.view(received.shape[0], key_heads, -1, received.shape[2]).mean(dim=2)

    @property
    def _key_heads(self) -> int:
        return sum(len(group.heads) for group in self.layer.groups)

    @functools.cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        """(B, 1, N): one for each real query and zero for padding; none where all are real."""
        if self.real is None:
            return ()
        queries = self.real[:, None, -self.tokens :]
        return () if bool(queries.all()) else (queries.float(),)

    def _query_heads(self, group: HeadGroup) -> list[int]:
        shared = self.call.query.shape[1] // self._key_heads
        return [head * shared + member for head in group.heads for member in range(shared)]

    def _sinks_of(self, group: HeadGroup) -> Tensor | None:
        """The sinks of a group's query heads."""
        sinks = self.call.sinks
        if sinks is None or len(self.layer.groups) == 1:
            return sinks
        return sinks[self._query_heads(group)] if sinks.ndim == 1 else sinks[:, self._query_heads(group)]

    def _mask(self) -> Tensor | None:
        """The call's mask in four dimensions.

        Raises:
            NotImplementedError: one that the model makes from the keys at hand, of fewer than the text has tokens.
        """
        mask = self.call.attn_mask
        if mask is not None and self.layer.dropped and mask.shape[-1] != self.layer.seen:
            raise NotImplementedError(
                f"compress cannot drop entries of {self.call.place.path}, which makes its mask from the keys at hand: "
                f"it masks {mask.shape[-1]} where the text has {self.layer.seen} tokens"
            )
        return mask if mask is None or mask.ndim == 4 else mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)

    def _mask_of(self, group: HeadGroup, heads: int) -> Tensor | None:
        """The mask on a group's entries, (B, 1 or its query heads, N, L)."""
        mask = self._mask()
        if mask is None and self.tokens == 1 and not group.has_empty:
            return None
        positions = group.all_positions()[:, :, None]  # (B, h, 1, L)
        if mask is None:
            queries = torch.arange(self.layer.seen - self.tokens, self.layer.seen, device=positions.device)
            found = (positions <= queries[:, None]) & (positions >= 0)
            return found.repeat_interleave(heads // found.shape[1], dim=1)
        if mask.shape[1] > 1:
            mask = mask[:, self._query_heads(group)]
        shared = heads // positions.shape[1]
        index = positions.repeat_interleave(shared, dim=1).clamp(min=0).expand(-1, -1, self.tokens, -1)
        found = mask.expand(positions.shape[0], heads, -1, -1).gather(3, index)
        if not group.has_empty:
            return found
        empty = (positions < 0).repeat_interleave(shared, dim=1)
        return found & ~empty if found.dtype == torch.bool else found.masked_fill(empty, -math.inf)


def _visible(mask: Tensor) -> Tensor:
    """Where a mask lets a query look, boolean or additive."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
