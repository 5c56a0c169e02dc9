"""The entries of key heads that hold equally many: a block of keys and values, and where in the text they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class HeadGroup:
    """Keys and values (B, h, L, D) of some key heads of a layer.

    The first entries stand at ``positions`` (B, h, K) of the text, −1 for a slot that is empty since another row of the
    batch holds more; those after them at ``start`` and on. ``received`` (B, h, L) is the attention that each
    entry was given, where the policy reads it. Of the first ``until`` entries calls read the ``chosen`` ones only, (B, h, K)
    with −1 for none; all if it is None.
    """

    heads: list[int]
    keys: Tensor
    values: Tensor
    positions: Tensor
    start: int
    received: Tensor
    has_empty: bool = False
    chosen: Tensor | None = None  # (B, h, K): which of its first `until` entries calls read, −1 for none; None for all
    until: int = 0
    _rooms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Entries of each head."""
        return int(self.keys.shape[2])

    @property
    def bytes(self) -> int:
        """What keys and values take, the room for further ones included."""
        blocks = (self._rooms.get(name, getattr(self, name)) for name in ("keys", "values"))
        return sum(block.numel() * block.element_size() for block in blocks)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens, (B, h, n, D)."""
        self.keys, self.values = self._longer("keys", keys), self._longer("values", values)
        if self.received.numel():
            self.received = functional.pad(self.received, (0, keys.shape[2]))

    def _longer(self, name: str, new: Tensor) -> Tensor:
        """Keys or values with new ones at the end, where there is room for most tokens without a copy of all others."""
        old, room = getattr(self, name), self._rooms.get(name)
        end = old.shape[2] + new.shape[2]
        if room is None or room.shape[2] < end or not _writable(room):
            spare = new.new_empty(*old.shape[:2], max(8, end // 16), old.shape[3])
            room = torch.cat([old, new, spare], dim=2)
            self._rooms[name] = room
        else:
            room[:, :, old.shape[2] : end] = new
        return room[:, :, :end]

    def all_positions(self) -> Tensor:
        """(B, h, L): where in the text each entry stands, −1 for an empty slot."""
        later = torch.arange(self.length - self.positions.shape[2], device=self.keys.device) + self.start
        return torch.cat([self.positions, later.expand(*self.positions.shape[:2], -1)], dim=2)

    def read(self) -> HeadGroup:
        """What calls attend to: itself, or the entries that are chosen and those that came since."""
        return self if self.chosen is None else ChosenPart.of(self)

    def choose(self, index: Tensor) -> HeadGroup:
        """Its entries, of which calls are to read these (B, h, K) only, −1 for none, and those to come."""
        return replace(self, chosen=index, until=self.length)

    def chosen_index(self) -> Tensor:
        """(B, h, entries that calls read): their places, −1 for none."""
        later = torch.arange(self.until if self.chosen is not None else 0, self.length, device=self.keys.device)
        later = later.expand(*self.keys.shape[:2], -1)
        return later if self.chosen is None else torch.cat([self.chosen, later], dim=2)

    def read_positions(self) -> Tensor:
        """(B, h, entries that calls read): where in the text they stand, −1 for none."""
        if self.chosen is None:
            return self.all_positions()
        index = self.chosen_index()
        return self.all_positions().gather(2, index.clamp(min=0)).masked_fill(index < 0, -1)

    def receive(self, attention: Tensor) -> None:
        """Add attention (B, h, L) to what the entries received."""
        self.received = self.received + attention if self.received.numel() else attention

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Other texts of the batch, or in another order: the same for all that has a row for each."""
        self._rooms.clear()
        for name in ("keys", "values", "positions", "received"):
            setattr(self, name, change(getattr(self, name)))
        self.chosen = None if self.chosen is None else change(self.chosen)

    def select(self, heads: list[int], index: Tensor, empty: Tensor) -> HeadGroup:
        """Some of its heads, by their place in it, with these entries only, (B, h, K); ``empty`` slots hold none."""
        keys, values = (
            tensor[:, heads].gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))
            for tensor in (self.keys, self.values)
        )
        positions = self.all_positions()[:, heads].gather(2, index).masked_fill(empty, -1)
        received = self.received[:, heads].gather(2, index) if self.received.numel() else self.received[:, heads]
        names = [self.heads[head] for head in heads]
        return HeadGroup(names, keys, values, positions, self._next(), received, bool((positions < 0).any()))

    def with_values(self, values: Tensor) -> HeadGroup:
        """Its entries with other values."""
        return replace(self, values=values, _rooms={name: room for name, room in self._rooms.items() if name == "keys"})

    def remove_last(self, number: int) -> None:
        """Take back so many last tokens, none of which was dropped."""
        end = self.length - number
        self.keys, self.values, self.received = (
            self.keys[:, :, :end],
            self.values[:, :, :end],
            self.received[:, :, :end],
        )
        if self.chosen is not None:
            self.chosen = self.chosen.masked_fill(self.chosen >= end, -1)
            self.until = min(self.until, end)

    def can_replace(self) -> bool:
        """Whether `replace` may write into what is there."""
        return len(self._rooms) == 2 and not self.has_empty and all(_writable(room) for room in self._rooms.values())

    def replace(self, entry: Tensor) -> None:
        """Drop one entry of each head, (B, h), and put the last one into its place: nothing else is copied."""
        positions, start, last = self.all_positions(), self._next(), self.length - 1
        blocks = [self.keys, self.values, positions, *([self.received] if self.received.numel() else [])]
        for block in blocks:
            place = entry[..., None] if block.ndim == 3 else entry[..., None, None].expand(-1, -1, 1, block.shape[3])
            block.scatter_(2, place, block[:, :, last:].clone())
        self.keys, self.values = self.keys[:, :, :last], self.values[:, :, :last]
        self.positions, self.start, self.received = positions[..., :last], start, self.received[..., :last]

    def _next(self) -> int:
        """The position of the next token."""
        return self.start + self.length - self.positions.shape[2]


@dataclass
class ChosenPart(HeadGroup):
    """The entries of a group that calls read, which they are gathered for; what these receive goes to the group's."""

    source: HeadGroup = field(kw_only=True)
    index: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, group: HeadGroup) -> ChosenPart:
        """The chosen entries of a group."""
        index = group.chosen_index()
        heads = list(range(len(group.heads)))
        part = group.select(heads, index.clamp(min=0), index < 0)
        return cls(
            part.heads, part.keys, part.values, part.positions, part.start, part.received, part.has_empty,
            source=group, index=index,
        )  # fmt: skip

    def of_all(self, tensor: Tensor) -> Tensor:
        """(B, heads, chosen entries, D) of a tensor of all entries of the group."""
        index = self.index.clamp(min=0)[..., None].expand(-1, -1, -1, tensor.shape[3])
        return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, -1))

    def receive(self, attention: Tensor) -> None:
        """Add attention to what the entries of the group received."""
        length = self.source.length
        index = torch.where(self.index < 0, length, self.index)  # empty slots go to the end, which is cut off
        whole = attention.new_zeros(*attention.shape[:2], length + 1, *attention.shape[3:])
        index = index if attention.ndim == 3 else index[..., None].expand_as(attention)
        self.source.receive(whole.scatter(2, index, attention)[:, :, :length])


def merge(groups: list[HeadGroup]) -> HeadGroup:
    """Groups of equally many entries as one, its heads in order."""
    if len(groups) == 1:
        return groups[0]
    heads = [head for group in groups for head in group.heads]
    order = sorted(range(len(heads)), key=lambda place: heads[place])
    keys, values, positions, received = (
        torch.cat([getattr(group, name) for group in groups], dim=1)[:, order]
        for name in ("keys", "values", "positions", "received")
    )
    return HeadGroup(
        sorted(heads), keys, values, positions, groups[0].start, received, any(group.has_empty for group in groups)
    )


def _writable(tensor: Tensor) -> bool:
    """Whether a tensor may be changed in place: nobody differentiates through it, nor made it in inference mode alone."""
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not tensor.is_inference())
