"""Decoding steps that read a part of a cache of which nothing was dropped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache.kept_call import KeptCall
from regard.runtime import AttentionCall

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Policy


class PartialCall(KeptCall):
    """A call of one new token in which each query head reads some entries of all.

    Raises:
        ValueError: a cache of which another policy dropped some.
    """

    def __init__(self, policy: Policy, layer: KeptLayer, call: AttentionCall, tokens: int, due: bool = False) -> None:
        super().__init__(policy, layer, call, tokens, due)
        if layer.dropped:
            raise ValueError(
                f"{type(policy).__name__} chooses among all entries, but another policy dropped some of this cache; "
                "begin a new cache"
            )

    @property
    def is_whole(self) -> bool:
        """Never: heads read parts of it."""
        return False


def with_hidden(call: AttentionCall, hidden: Tensor) -> AttentionCall:
    """The call with entries (B, Hq, N, M) masked beside those that its mask hides."""
    mask = call.attn_mask
    if mask is None or mask.dtype == torch.bool:
        return replace(call, attn_mask=~hidden if mask is None else mask & ~hidden)
    return replace(call, attn_mask=mask.masked_fill(hidden, -math.inf))
