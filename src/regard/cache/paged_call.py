"""One decoding step in which each query head attends to the pages that may matter most to it."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache.partial_call import PartialCall, with_hidden
from regard.runtime import AttentionCall, run

if TYPE_CHECKING:
    from regard.cache.quest import Quest


class PagedCall(PartialCall):
    """A call of one new token on keys in pages of ``policy.page`` real tokens, of which so many are read as the policy says.

    Shapes are of query heads by the key head that they share. What is known of a page are the least and the largest of its
    keys, channel by channel; the layer's state has them, and each new token is merged in.
    """

    policy: Quest

    def attend(self) -> Tensor:
        """The output, (B, Hq, 1, D), over the pages that are read."""
        index = self._positions.flatten(1, 2)  # (B, Hq, K)
        key, value = (_gathered(tensor, index) for tensor in self._tensors(self.layer.groups[0]))
        mask = self._mask()
        visible = (index >= 0)[:, :, None]
        if mask is not None:
            seen = mask.expand(*index.shape[:2], -1, -1).gather(3, index.clamp(min=0)[:, :, None])
            visible = seen & visible if mask.dtype == torch.bool else seen.masked_fill(~visible, -math.inf)
        return run(
            replace(
                self.call, key=key, value=value, attn_mask=visible, is_causal=False, scale=self.call.factor,
                enable_gqa=False,
            )
        )  # fmt: skip

    def restore(self) -> AttentionCall:
        """The call on all keys, of which those of other pages are masked."""
        restored = super().restore()
        index, seen = self._positions.flatten(1, 2), self.layer.seen
        read = torch.zeros(*index.shape[:2], seen + 1, dtype=torch.bool, device=index.device)
        read = read.scatter(2, torch.where(index < 0, seen, index), True)[:, :, None, :seen]
        return with_hidden(restored, ~read)

    @functools.cached_property
    def _ranks(self) -> Tensor:
        """(B, tokens): how many real tokens stand before each, −1 for padding."""
        if self.real is None:
            return torch.arange(self.layer.seen, device=self.call.query.device).expand(self.call.query.shape[0], -1)
        return (self.real.long().cumsum(dim=1) - 1).masked_fill(~self.real, -1)

    @functools.cached_property
    def _positions(self) -> Tensor:
        """(B, Hk, shared, K): where in the text the tokens of the pages that are read stand, −1 for none."""
        tokens, page = self._ranks.amax(dim=1) + 1, self.policy.page
        bound = self._bounds()
        there = torch.arange(bound.shape[3], device=bound.device) * page < tokens[:, None]
        number = self.policy.pages(tokens).minimum(there.sum(dim=1))
        pages = bound.masked_fill(~there[:, None, None], -math.inf).topk(int(number.amax()), dim=3).indices
        ranks = (pages[..., None] * page + torch.arange(page, device=pages.device)).flatten(3)
        read = torch.arange(ranks.shape[3], device=pages.device) < (number * page)[:, None]
        read = read[:, None, None] & (ranks < tokens[:, None, None, None])
        order = self._ranks.masked_fill(self._ranks < 0, self.layer.seen).argsort(dim=1)  # the position of each rank
        index = ranks.clamp(max=order.shape[1] - 1).flatten(1)
        return order.gather(1, index).view_as(ranks).masked_fill(~read, -1)

    def _bounds(self) -> Tensor:
        """(B, Hk, shared, pages): what a key of the page can have as its logit at most, before the scale."""
        with torch.no_grad():
            least, most = self._extremes()
            query = self.call.query.unflatten(1, (least.shape[1], -1))[..., 0, :].to(least.dtype)
            bounds: Tensor = query.clamp(min=0) @ most.mT + query.clamp(max=0) @ least.mT
            return bounds

    def _extremes(self) -> tuple[Tensor, Tensor]:
        """(B, Hk, pages, D) each: the least and the largest of the keys of each page, in float32 or finer."""
        keys, state = self._tensors(self.layer.groups[0])[0], self.layer.state
        wide = torch.promote_types(keys.dtype, torch.float32)
        end = int(state["end"][0]) if state else 0  # the same for all texts
        pages = int(self._ranks.amax()) // self.policy.page + 1
        further = pages - (state["most"].shape[2] if state else 0)
        room = keys.new_full((*keys.shape[:2], further, keys.shape[3]), torch.finfo(wide).max, dtype=wide)
        page = (self._ranks[:, end:].clamp(min=0) // self.policy.page)[:, None, :, None]
        padding = (self._ranks[:, end:] < 0)[:, None, :, None]
        new = keys[:, :, end:].to(wide)
        for name, sign in (("least", 1), ("most", -1)):
            before = torch.cat([state[name], sign * room], dim=2) if name in state else sign * room
            own = new.masked_fill(padding, sign * torch.finfo(wide).max)
            state[name] = before.scatter_reduce(2, page.expand_as(own), own, "amin" if sign > 0 else "amax")
        state["end"] = torch.full((keys.shape[0],), keys.shape[2], device=keys.device)
        return state["least"], state["most"]


def _gathered(tensor: Tensor, index: Tensor) -> Tensor:
    """Keys or values (B, Hq, K, D) of each query head, at positions (B, Hq, K), of those of key heads (B, Hk, L, D)."""
    shared = index.shape[1] // tensor.shape[1]
    index = index.clamp(min=0).unflatten(1, (-1, shared))[..., None].expand(-1, -1, -1, -1, tensor.shape[3])
    return tensor[:, :, None].expand(-1, -1, shared, -1, -1).gather(3, index).flatten(1, 2)
