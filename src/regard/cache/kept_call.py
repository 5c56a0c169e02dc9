"""One attention call over the entries that are left of its cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.cache.head_group import HeadGroup, ReadPart
from regard.cache.module_call import ModuleCall
from regard.cache.narrow_group import NarrowGroup
from regard.cache.policy import Reads
from regard.cache.window import joined, last_queries
from regard.maps import TokenMap
from regard.runtime import AttentionCall, run, visible

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Policy


_CANDIDATES = 256  # tokens that assisted generation may reject after a pass, at most


class KeptCall:
    """A call of a layer whose entries are kept; ``tokens`` of its keys are new.

    After it a policy chooses what stays if it is ``due``. Without a policy it is that of a layer which attends to the
    entries of another, as that one's own call had them.
    """

    def __init__(
        self, policy: Policy | None, layer: KeptLayer, call: AttentionCall, tokens: int, due: bool = False
    ) -> None:
        if call.rule is not None:
            raise NotImplementedError(
                f"compress cannot drop entries of {call.place.path}, which attends under a rule; give it "
                "attn_mask=rule.dense(…)"
            )
        self.policy = policy
        self.reads = Reads() if policy is None else policy.reads_in_all
        self.layer = layer
        self.call = call
        self.tokens = tokens
        self.due = due
        held = layer.groups if policy is not None else layer.before or layer.groups
        self.groups = [group.read() for group in held]
        self.reads_window = False  # whether queries of earlier calls are read too
        # of how many last queries the attention is read
        self.observed = 0 if policy is None else self._count_observed(policy)

    def _count_observed(self, policy: Policy) -> int:
        reads, tokens = self.reads.attention_of, self.tokens
        if reads != 0 and self.layer.recording:
            return self._later(policy)
        if reads is None or self.reads.accumulates:
            in_steps = self.reads.accumulates or policy.when.while_decoding
            return min(reads or tokens, tokens) if tokens > 1 or in_steps else 0
        if not (self.due and reads):
            return 0
        self.layer.forget()  # what earlier queries attended to: these are all that the policy reads
        self.reads_window = tokens < reads and bool(self.layer.window)
        if self.reads_window:
            return 0
        if self._chosen is None or tokens == 1:
            return min(reads, tokens)
        return tokens - int(self._chosen.any(dim=0).long().argmax())

    def _later(self, policy: Policy) -> int:
        """Nothing is read before it is known which tokens stay; then the last queries of these."""
        if self.reads.attention_of is None or self.reads.accumulates:
            raise ValueError(
                f"{policy} adds up the attention of every query, and assisted generation takes back those of tokens that it "
                "rejects: generate without an assistant, or take a policy that reads the last queries, such as SnapKV"
            )
        self.reads_window = True
        return 0

    @functools.cached_property
    def _chosen(self) -> Tensor | None:
        """(B, N): which of the call's queries are read: the last real ones of each text; None for all, or the last ones."""
        if self.real is None or self.policy is None:
            return None
        real, reads = self.real[:, -self.tokens :], self.reads.attention_of
        return real if reads is None else real & (real.flip(1).cumsum(1).flip(1) <= reads)

    @property
    def is_whole(self) -> bool:
        """Whether the call, as the model made it, is on all that the cache is to be read for."""
        if self.policy is None:
            return self.call.key.shape[2] == self.layer.seen
        return not self.layer.dropped

    @functools.cached_property
    def real(self) -> Tensor | None:
        """(B, tokens so far): real tokens, as far as the last query may see them; None for all."""
        mask = self._mask()
        if mask is None:
            return None
        return visible(mask[:, 0, -1]).expand(self.call.query.shape[0], -1)

    @property
    def left(self) -> int:
        """How many of its tokens were not taken back since."""
        return self.tokens - self.layer.removed

    def restore(self) -> AttentionCall:
        """The call on a key for every token so far; those that are gone are zeros, and masked."""
        batch, _, tokens, _ = self.call.query.shape
        groups, seen = self.groups, self.layer.seen
        heads = self._key_heads
        key, value = (t.new_zeros(batch, self._width(t), seen + 1, t.shape[3]) for t in self._tensors(groups[0]))
        left = torch.zeros(batch, heads, seen + 1, dtype=torch.bool, device=key.device)
        for group in groups:
            index = group.all_positions()
            index = torch.where(index < 0, seen, index)  # empty slots go to the end, which is cut off
            left[:, group.heads] = left[:, group.heads].scatter(2, index, True)
            places = slice(None) if self.layer.is_latent else group.heads
            for full, own in zip((key, value), self._tensors(group), strict=True):
                full[:, places] = full[:, places].scatter(2, index[..., None].expand_as(own), own)
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

    def _tensors(self, group: HeadGroup) -> tuple[Tensor, Tensor]:
        """Keys and values of a group, or those of all heads that the model has made of latents."""
        if not self.layer.is_latent:
            return group.whole_keys(), group.values
        key, value = self.call.key, self.call.value
        return (group.of_all(key), group.of_all(value)) if isinstance(group, ReadPart) else (key, value)

    @property
    def expanded(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values that the model has made of latents; None where it caches them themselves."""
        if not self.layer.is_latent:
            return None
        (group,) = self.layer.groups
        own = slice(group.packed_length, group.packed_length + group.length)  # some may have been taken back
        return self.call.key[:, :, own], self.call.value[:, :, own]

    def _width(self, tensor: Tensor) -> int:
        """How many heads keys or values have in all."""
        return int(tensor.shape[1]) if self.layer.is_latent else self._key_heads

    def ask(self, attention: TokenMap, last: AttentionCall) -> Callable[[], None]:
        """Have it read what the entries receive, where the policy wants that."""
        self.layer.edited |= last.edited
        if not self.observed:
            return lambda: None
        if self.observed == self.tokens > 1:
            attention.expect("received", *self._weights)
        return functools.partial(self._take, attention)

    def _take(self, attention: TokenMap) -> None:
        received = self._received(attention)
        for group in self.groups:
            positions = group.all_positions()
            if received.ndim == 4:
                positions = positions[..., None].expand(-1, -1, -1, received.shape[3])
            own = received[:, group.heads].gather(2, positions.clamp(min=0))
            group.receive(own.masked_fill(positions < 0, 0.0))

    def attend(self) -> Tensor:
        """The output, (B, Hq, N, D), over the entries that are left."""
        groups = self.groups
        outputs = [self._attend(group) for group in groups]
        if len(groups) == 1:
            return outputs[0]
        output = outputs[0].new_empty(*self.call.query.shape[:3], outputs[0].shape[-1])
        for group, part in zip(groups, outputs, strict=True):
            output[:, self._query_heads(group)] = part
        return output

    def _attend(self, group: HeadGroup) -> Tensor:
        plain = self.call.softcap is None and self.call.sinks is None and not self.layer.is_latent
        if (self.observed or isinstance(group, NarrowGroup)) and self.tokens == 1 and plain:
            query = self._query_of(group)
            return self._step(group, query, self._mask_of(group, query.shape[1]))
        own = self._call_on(group)
        if self.observed:
            with torch.no_grad():
                group.receive(self._received(own.map()))
        return run(own)

    def _query_of(self, group: HeadGroup) -> Tensor:
        return self.call.query if len(self.groups) == 1 else self.call.query[:, self._query_heads(group)]

    def _call_on(self, group: HeadGroup) -> AttentionCall:
        """The call on a group's entries."""
        query, (key, value) = self._query_of(group), self._tensors(group)
        return replace(
            self.call, query=query, key=key, value=value, attn_mask=self._mask_of(group, query.shape[1]),
            is_causal=False, scale=self.call.factor, enable_gqa=query.shape[1] > key.shape[1],
            sinks=self._sinks_of(group),
        )  # fmt: skip

    @property
    def queries_to_keep(self) -> int:
        """How many last queries the policy may want to read in later calls."""
        number = max(0 if self.reads.accumulates else self.reads.attention_of or 0, self.reads.queries)
        if number and self.layer.recording:
            return number + _CANDIDATES
        return number if number > 1 else 0

    def note_queries(self) -> None:
        """Have the layer keep the call's last queries."""
        number, windows = self.queries_to_keep, self.layer.window
        if number:
            windows.append(last_queries(self.call.query, self._mask(), self.real, self.layer.seen, number))
        if self.tokens == 1:  # counted by calls, in which a step stands for itself
            del windows[: max(len(windows) - number, 0)]
            return
        while sum(window.length for window in windows[1:]) >= max(number, 1):
            del windows[0]

    def read_window(self) -> None:
        """Read what the last queries, of earlier calls too, attend to among the entries that are left."""
        if not self.reads_window:
            return
        if self.layer.edited:
            raise NotImplementedError(
                f"{self.policy} reads what queries of earlier passes attend to now, and what regard.steer changes of that is "
                "not known any more: choose when=AfterPrompt(), or steer without compress"
            )
        query, mask, chosen = joined(self.layer.window, self.layer.seen, self.reads.attention_of or 0)
        group = self.layer.groups[0]
        end = group.packed_length + group.length if self.layer.is_latent else None  # some may have been taken back
        key, value = self.call.key[:, :, :end], self.call.value[:, :, :end]
        call = replace(self.call, query=query, key=key, value=value, attn_mask=mask, is_causal=False)
        window = KeptCall(None, self.layer, call, query.shape[2])
        window.reads, window.observed = self.reads, query.shape[2]
        weights = () if chosen is None else (chosen[:, None].float(),)
        with torch.no_grad():
            for group in map(HeadGroup.held, self.layer.groups):
                group.receive(window._received(window._call_on(group).map(), weights))

    def drop(self, real: Tensor | None, memory: dict[Any, Any], **further: Any) -> None:
        """Have the policy choose what stays of the layer.

        ``real`` (B, tokens so far) tells tokens from padding, None if there is none; ``memory`` and the others are fields of
        `Entries`.
        """
        assert self.policy is not None
        policy, layer = self.policy, self.layer
        self.read_window()
        made_by = ModuleCall(
            self.call, layer.seen, real, layer.is_latent, layer.removed, layer.window, policy.reads.queries
        )
        entries = layer.entries(real, memory, self.expanded, new=self.left, made_by=made_by, **further)
        scores = policy.score(entries).masked_fill(~entries.real, -math.inf)
        counts = policy.counts(entries, scores).minimum(entries.real.sum(dim=-1))
        layer.whole = policy.keeps_whole(entries)
        if not policy.reads.accumulates:
            layer.forget()
        policy.rest.apply(layer, entries, scores, counts, policy.pools)

    def _step(self, group: HeadGroup, query: Tensor, mask: Tensor | None) -> Tensor:
        """One query, whose small matrix is at hand."""
        batch, heads, _, width = query.shape
        shared = heads // len(group.heads)
        logits = group.products(query.view(batch, -1, shared, width)).float() * self.call.factor
        if mask is not None:
            mask = mask.expand(-1, heads, -1, -1).reshape(mask.shape[0], -1, shared, group.length)
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        matrix = logits.softmax(dim=-1).nan_to_num(0.0)
        if self.observed:
            attention = matrix.detach()
            group.receive(attention.mT if self.reads.by_query_head else attention.mean(dim=2))
        return (matrix.to(group.values.dtype) @ group.values).view(batch, heads, 1, -1)

    def _received(self, attention: TokenMap, weights: tuple[Tensor, ...] | None = None) -> Tensor:
        """(B, Hk, keys): what the keys receive from the queries that are read, the mean over the heads of a group.

        (B, Hk, keys, shared) where the policy wants each query head's.
        """
        weights = self._weights if weights is None else weights
        if self.observed == self.tokens > 1:
            received = attention.received(*weights)
        else:
            rows = attention.rows(slice(self.tokens - self.observed, self.tokens))
            for weight in weights:
                rows = rows * weight[:, :, -self.observed :, None]
            received = rows.sum(dim=2)
        key_heads = received.shape[1] * self._key_heads // self.call.query.shape[1]
        received = received.view(received.shape[0], key_heads, -1, received.shape[2])
        return received.mT if self.reads.by_query_head else received.mean(dim=2)

    @property
    def _key_heads(self) -> int:
        return sum(len(group.heads) for group in self.groups)

    @functools.cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        """(B, 1, N): one for each query that is read and zero for others, such as padding; none where all are read."""
        if self._chosen is None or bool(self._chosen[:, -self.observed :].all()):
            return ()
        return (self._chosen[:, None].float(),)

    def _query_heads(self, group: HeadGroup) -> list[int]:
        shared = self.call.query.shape[1] // self._key_heads
        return [head * shared + member for head in group.heads for member in range(shared)]

    def _sinks_of(self, group: HeadGroup) -> Tensor | None:
        """The sinks of a group's query heads."""
        sinks = self.call.sinks
        if sinks is None or len(self.groups) == 1:
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
