"""Entries most of whose keys hold some of their channels only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.cache.head_group import HeadGroup


@dataclass
class NarrowGroup(HeadGroup):
    """A group of which the first entries hold the ``channels`` (B, h, C) of their keys alone, as ``narrow`` (B, h, n, C).

    ``keys`` are those of the others. The channels that are gone are read as zeros.
    """

    narrow: Tensor = field(kw_only=True)
    channels: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, group: HeadGroup, channels: Tensor, window: int) -> HeadGroup:
        """A group with these channels alone of all but its last ``window`` entries; itself if it has no others."""
        group = group.whole()
        cut = group.length - window
        if cut <= 0:
            return group
        narrow = group.keys[:, :, :cut].gather(3, channels[:, :, None].expand(-1, -1, cut, -1))
        return cls(
            group.heads, group.keys[:, :, cut:].clone(), group.values, group.positions, group.start, group.received,
            group.has_empty, group.chosen, group.until, group.packed, narrow=narrow, channels=channels,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Entries of each head."""
        return int(self.narrow.shape[2] + self.keys.shape[2])

    @property
    def bytes(self) -> int:
        """What keys and values take, with the numbers of the channels."""
        return super().bytes + self.narrow.nbytes + self.channels.nbytes

    def whole_keys(self) -> Tensor:
        """(B, h, L, D), with zeros for what is gone."""
        before = self.narrow.shape[2]
        zeros = self.narrow.new_zeros(*self.narrow.shape[:3], self.keys.shape[3])
        wide = zeros.scatter(3, self.channels[:, :, None].expand(-1, -1, before, -1), self.narrow)
        return torch.cat([wide, self.keys], dim=2)

    def whole(self) -> HeadGroup:
        """With keys of the full width."""
        return HeadGroup(
            self.heads, self.whole_keys(), self.values, self.positions, self.start, self.received, self.has_empty,
            self.chosen, self.until, self.packed,
        )  # fmt: skip

    def products(self, query: Tensor) -> Tensor:
        """Products (B, h, n, L) with queries (B, h, n, D), of channels that are there."""
        own = query.gather(3, self.channels[:, :, None].expand(-1, -1, query.shape[2], -1))
        return torch.cat([own @ self.narrow.mT, query @ self.keys.mT], dim=3)

    def select(self, heads: list[int], index: Tensor, empty: Tensor) -> HeadGroup:
        """Some of its heads and entries, with keys of the full width."""
        return self.whole().select(heads, index, empty)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Other texts of the batch, or in another order."""
        super().change_rows(change)
        self.narrow, self.channels = change(self.narrow), change(self.channels)

    def remove_last(self, number: int) -> None:
        """Take back so many last tokens, whose keys are whole."""
        keys = self.keys
        super().remove_last(number)
        self.keys = keys[:, :, : keys.shape[2] - number]

    def can_replace(self) -> bool:
        """Never: an entry that takes another's place would have to be as narrow."""
        return False
