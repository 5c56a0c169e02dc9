"""One layer's keys and values, of which each head may hold others: what takes the place of transformers' own layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from regard.cache.policy import Entries

if TYPE_CHECKING:
    from regard.cache.compress import compress


@dataclass
class HeadGroup:
    """The entries of those key heads of a layer that hold equally many.

    ``keys`` and ``values`` are (B, h, L, D). Their first entries stand at ``positions`` (B, h, K) of the text, −1 for a slot
    that is empty since another row of the batch holds more; those after them at ``start`` and on. ``received``
    (B, h, L) is the attention that each entry was given, where the policy reads it.
    """

    heads: list[int]
    keys: Tensor
    values: Tensor
    positions: Tensor
    start: int
    received: Tensor

    @property
    def length(self) -> int:
        """Entries of each head."""
        return int(self.keys.shape[2])

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what has a row for each text of the batch."""
        return ("keys", "values", "positions", "received")

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens, (B, h, n, D)."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)
        if self.received.numel():
            self.received = functional.pad(self.received, (0, keys.shape[2]))

    def all_positions(self) -> Tensor:
        """(B, h, L): where in the text each entry stands, −1 for an empty slot."""
        later = torch.arange(self.length - self.positions.shape[2], device=self.keys.device) + self.start
        return torch.cat([self.positions, later.expand(*self.positions.shape[:2], -1)], dim=2)

    @functools.cached_property
    def has_empty(self) -> bool:
        """Whether some slots hold no entry."""
        return bool((self.positions < 0).any())

    def receive(self, attention: Tensor) -> None:
        """Add attention (B, h, L) to what the entries received."""
        self.received = self.received + attention if self.received.numel() else attention

    def select(self, heads: list[int], index: Tensor, empty: Tensor) -> HeadGroup:
        """Some of its heads, by their place in it, with these entries only, (B, h, K); ``empty`` slots hold none."""
        keys, values = (
            tensor[:, heads].gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3]))
            for tensor in (self.keys, self.values)
        )
        positions = self.all_positions()[:, heads].gather(2, index).masked_fill(empty, -1)
        received = self.received[:, heads].gather(2, index) if self.received.numel() else self.received[:, heads]
        start = self.start + self.length - self.positions.shape[2]
        return HeadGroup([self.heads[head] for head in heads], keys, values, positions, start, received)


def _merge(groups: list[HeadGroup]) -> HeadGroup:
    """Groups of equally many entries as one."""
    if len(groups) == 1:
        return groups[0]
    tensors = {name: torch.cat([getattr(group, name) for group in groups], dim=1) for name in groups[0].tensors}
    return HeadGroup([head for group in groups for head in group.heads], start=groups[0].start, **tensors)


class KeptLayer(CacheLayerMixin):
    """A layer of a cache that counts every token and holds what the policy of `regard.compress` left of them."""

    is_sliding = False

    def __init__(self, rank: int, layers: int, keeper: compress) -> None:
        self.keys = self.values = None  # which head groups hold here
        self.is_initialized = False
        self.rank = rank  # among the layers that are kept like this one
        self.layers = layers
        self.keeper: compress | None = keeper
        self.groups: list[HeadGroup] = []
        self.state: dict[str, Tensor] = {}  # what the policy remembers, with a row for each text
        self.seen = 0  # tokens so far, dropped ones too: rotary positions go on from here
        self.steps = 0  # decoding steps since the last prompt
        self.dropped = False

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Begin with keys and values (B, Hk, N, D) that nothing was dropped of."""
        self.dtype, self.device = keys.dtype, keys.device
        none = keys.new_zeros(*keys.shape[:2], 0)
        self.groups = [HeadGroup(list(range(keys.shape[1])), keys, values, none.long(), 0, none.float())]
        self.seen = keys.shape[2]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens; the attention call that follows is this layer's.

        The call is handed everything if nothing was dropped. Otherwise it gets the new ones only, to go by their shapes: what
        it attends to is found where the call arrives.
        """
        if self.keeper is None:
            raise RuntimeError(
                "this cache was compressed, and its model can read it within regard.compress(model, policy) only"
            )
        if not self.groups:
            self.fill(key_states, value_states)
        else:
            for group in self.groups:
                group.append(key_states[:, group.heads], value_states[:, group.heads])
            self.seen += key_states.shape[2]
        self.keeper.expect(self, key_states.shape[2])
        if self.dropped:
            return key_states, value_states
        return self.groups[0].keys, self.groups[0].values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens."""
        self.fill(key_states[:, :, :0], value_states[:, :, :0])

    def entries(self, real: Tensor | None, memory: dict[Any, Any]) -> Entries:
        """What a policy sees of the layer; ``real`` (B, tokens so far) tells tokens from padding."""
        keys, values, positions, received = (self._of_all_heads(name) for name in self.groups[0].tensors)
        batch = keys.shape[0]
        there = positions >= 0
        if real is None:
            first = torch.zeros(batch, 1, 1, dtype=torch.long, device=keys.device)
        else:
            real = real.to(keys.device)
            first = real.long().argmax(dim=1)[:, None, None]
            index = positions.clamp(min=0)
            there = there & real[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return Entries(
            self.rank, self.layers, keys, values, positions, there, received, first, self.seen, memory
        )  # fmt: skip

    def _of_all_heads(self, name: str) -> Tensor:
        """(B, Hk, L, …) of a tensor of the groups; those with fewer entries end in empty slots."""
        longest = max(group.length for group in self.groups)
        parts = []
        for group in self.groups:
            part = group.all_positions() if name == "positions" else getattr(group, name)
            if name == "received" and not part.numel():
                part = torch.zeros(group.keys.shape[:3], device=part.device)
            if len(self.groups) == 1:
                return part
            padding = [0, 0] * (part.ndim - 3) + [0, longest - group.length]
            parts.append(functional.pad(part, padding, value=-1 if name == "positions" else 0))
        order = torch.tensor([head for group in self.groups for head in group.heads]).argsort()
        return torch.cat(parts, dim=1)[:, order]

    def keep(self, scores: Tensor, counts: Tensor) -> None:
        """Drop all but the entries of the highest scores (B, Hk, L), as many of each head as the counts (B, Hk) say."""
        lengths = [
            next(group.length for group in self.groups if head in group.heads) for head in range(counts.shape[1])
        ]
        longest = counts.amax(dim=0).tolist()
        if all(kept >= length for kept, length in zip(longest, lengths, strict=True)):
            return
        best = scores.argsort(dim=-1, descending=True, stable=True)
        groups = []
        for number in sorted(set(longest)):
            parts = []
            for group in self.groups:
                places = [place for place, head in enumerate(group.heads) if longest[head] == number]
                if places:
                    heads = [group.heads[place] for place in places]
                    empty = torch.arange(number, device=counts.device) >= counts[:, heads, None]
                    index = (
                        best[:, heads, :number].masked_fill(empty, -1).sort(dim=-1).values
                    )  # in the order of the text
                    parts.append(group.select(places, index.clamp(min=0), index < 0))
            groups.append(_merge(parts))
        self.groups = groups
        self.dropped = True

    def forget(self) -> None:
        """What the entries received."""
        for group in self.groups:
            group.received = group.received[..., :0]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The model masks all tokens seen; the mask is reduced to those that are left where the call arrives."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.state, self.seen, self.steps = [], {}, 0, 0
        self.dropped = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some texts only."""
        self._rows(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was dropped for the tokens to be removed cannot be brought back."""
        if tokens_to_remove:
            raise NotImplementedError(
                "a compressed cache cannot be cropped (assisted generation does): generate without an assistant, "
                "or without regard.compress"
            )

    def offload(self) -> None:
        """Refuse to be moved: an offloaded cache is not adopted."""
        raise NotImplementedError("a compressed cache cannot be offloaded")

    def numbers(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for group in self.groups for t in (group.keys, group.values))

    def _rows(self, change: Any) -> None:
        for group in self.groups:
            for name in group.tensors:
                setattr(group, name, change(getattr(group, name)))
        self.state = {name: change(tensor) for name, tensor in self.state.items()}
