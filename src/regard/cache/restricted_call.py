"""One decoding step in which each head attends to all entries, or to its local ones only."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from regard.cache.partial_call import PartialCall, with_hidden
from regard.cache.policy import Step
from regard.runtime import AttentionCall

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.qada import QAdA


Place = tuple[slice, slice]  # of texts and key heads


class RestrictedCall(PartialCall):
    """A call of one new token, where the policy says of each query head whether the local entries will do for it.

    Shapes are of query heads by the key head that they share, (B, Hk, shared, …), as if those were tokens: a key head's
    entries are read once, or not at all.
    """

    policy: QAdA

    def __init__(self, policy: QAdA, layer: KeptLayer, call: AttentionCall, tokens: int, due: bool = False) -> None:
        super().__init__(policy, layer, call, tokens, due)
        if call.softcap is not None or call.sinks is not None:
            raise ValueError(
                f"{type(policy).__name__} chooses entries by their logits, and knows no soft cap or sinks, as "
                f"{call.place.path} has; take another policy"
            )
        self.keys, self.values = self._tensors(layer.groups[0])
        self.query = call.query.view(*self.keys.shape[:2], -1, call.query.shape[3])

    def attend(self) -> Tensor:
        """The output, (B, Hq, 1, D): of the local entries, and of all where a head wants them."""
        output = self._from_local()
        for place in self._reading_all():
            local = self._is_local[place][..., None]
            output[place] = torch.where(local, output[place], self._from_all(place))
        return output.flatten(1, 2)[:, :, None]

    def restore(self) -> AttentionCall:
        """The call on all keys, of which those that are not local are masked for the heads that are."""
        restored = super().restore()
        seen = self.layer.seen
        positions = torch.where(self._positions < 0, seen, self._positions)
        far = self.keys.new_ones(len(positions), seen + 1, dtype=torch.bool).scatter(1, positions, False)
        hidden = self._is_local.flatten(1, 2)[:, :, None, None] & far[:, None, None, :seen]
        return with_hidden(restored, hidden)

    @functools.cached_property
    def _is_local(self) -> Tensor:
        """(B, Hk, shared)."""
        with torch.no_grad():
            mass = self._local_logits.logsumexp(dim=-1)
            query = self.query.to(mass.dtype) * self.call.factor
            return self.policy.is_local(Step(query, mass, self.keys, self._first, self.layer.state))

    @functools.cached_property
    def _first(self) -> Tensor:
        """(B,): where each text's first real token stands."""
        if self.real is None:
            return torch.zeros(self.query.shape[0], dtype=torch.long, device=self.query.device)
        first = self.real.long().argmax(dim=1)
        if bool((self.real.sum(dim=1) + first != self.real.shape[1]).any()):
            raise ValueError(
                f"{type(self.policy).__name__} takes a text's last tokens for its local ones, but this batch is padded on "
                'the right: pad it on the left, with tokenizer.padding_side = "left"'
            )
        return first

    @functools.cached_property
    def _positions(self) -> Tensor:
        """(B, sinks + recent): positions of the local entries, −1 for sinks that are among the recent ones."""
        sinks, recent = self.policy.local
        start, device = self.layer.seen - recent, self._first.device
        firsts = self._first[:, None] + torch.arange(sinks, device=device)
        lasts = torch.arange(start, start + recent, device=device).expand(len(firsts), -1)
        return torch.cat([firsts.masked_fill(firsts >= start, -1), lasts], dim=1)

    @functools.cached_property
    def _local_logits(self) -> Tensor:
        """(B, Hk, shared, sinks + recent), −inf for what is hidden."""
        keys = self._local(self.keys)
        logits = self.query.to(keys.dtype) @ keys.mT * self.call.factor
        hidden = (self._positions < 0)[:, None, None]
        if self._grouped_mask is not None:
            index = self._positions.clamp(min=0)[:, None, None].expand_as(logits)
            mask = self._grouped_mask.gather(3, index)
            if mask.dtype == torch.bool:
                hidden = hidden | ~mask
            else:
                logits = logits + mask
        return logits.masked_fill(hidden, -math.inf)

    @functools.cached_property
    def _grouped_mask(self) -> Tensor | None:
        """The call's mask, (B, Hk, shared, tokens), without a copy."""
        mask = self._mask()
        heads = self.query.shape[1:3]
        return None if mask is None else mask[:, :, 0].expand(*self.call.query.shape[:2], -1).unflatten(1, heads)

    def _local(self, tensor: Tensor) -> Tensor:
        """The local entries' keys or values, (B, Hk, sinks + recent, D), in float32 or finer."""
        index = self._positions.clamp(min=0)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index).to(torch.promote_types(tensor.dtype, torch.float32))

    def _reading_all(self) -> list[Place]:
        """Texts and key heads of which some query head wants all entries: at once if all do, else one by one, uncopied."""
        wanted = (~self._is_local).any(dim=2)
        if bool(wanted.all()):
            return [(slice(None), slice(None))]
        return [(slice(row, row + 1), slice(head, head + 1)) for row, head in wanted.nonzero().tolist()]

    def _from_local(self) -> Tensor:
        """(B, Hk, shared, D)."""
        return (self._local_logits.softmax(dim=-1) @ self._local(self.values)).to(self.values.dtype)

    def _from_all(self, place: Place) -> Tensor:
        """The output (texts, key heads, shared, D) from all entries, of the texts and key heads of a place."""
        mask = None if self._grouped_mask is None else self._grouped_mask[place]
        return functional.scaled_dot_product_attention(
            self.query[place], self.keys[place], self.values[place], mask, self.call.dropout_p, scale=self.call.factor
        )
