"""One layer's keys and values, of which each head may hold others: what takes the place of transformers' own layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from regard.cache.head_group import HeadGroup, merge
from regard.cache.narrow_group import NarrowGroup
from regard.cache.open_block import OpenBlock
from regard.cache.packed import PackedEntries
from regard.cache.policy import Entries
from regard.cache.window import Window
from regard.runtime import Stack, interceptors

if TYPE_CHECKING:
    from regard.cache.after_block import AfterBlock


@runtime_checkable
class Keeper(Protocol):
    """Who answers the calls of a model's layers that are kept like these."""

    def keeps(self, stack: Stack) -> bool:
        """Whether it answers the calls of what runs there."""
        ...


class KeptLayer(CacheLayerMixin):
    """A layer of a cache that counts every token and holds what the policy of `regard.compress` left of them."""

    is_sliding = False
    is_croppable = True

    def __init__(self, rank: int, layers: int, block: OpenBlock) -> None:
        self.keys = self.values = None  # which head groups hold here
        self.is_initialized = False
        self.rank = rank  # among the layers that are kept like this one
        self.layers = layers
        self.block = block
        self.groups: list[HeadGroup] = []
        self.state: dict[str, Tensor] = {}  # what the policy remembers, with a row for each text
        self.seen = 0  # tokens so far, dropped ones too: rotary positions go on from here
        self.steps = 0  # decoding steps since the last prompt
        self.new = 0  # tokens whose attention call is to come
        self.dropped = False
        self.is_latent = False  # whether the model makes keys and values of what it caches
        self.is_shared = False  # whether layers without keys of their own attend to these
        self.handed: ReferenceType[Tensor] | None = None  # the keys that the last update returned
        self.before: list[HeadGroup] = []  # what the last call read of a shared layer, where entries were dropped since
        self.window: list[Window] = []  # queries that a policy is still to read the attention of
        self.dropped_at = 0  # tokens seen when entries were dropped last
        self.recording = False  # whether tokens may be taken back after a pass
        self.verifies = False  # whether its passes are of candidates for the next tokens, not a turn
        self.removed = 0  # tokens that were taken back since the last update
        self.pending: Callable[[], None] | None = None  # what is to be dropped at the next update
        self.after: AfterBlock | None = None  # who reads the layer outside a block
        self.edited = False  # whether regard.steer has changed a call of it
        self.whole: Tensor | None = None  # (B,), boolean: texts that are too short for the policy to drop any of
        self.token_ids: Tensor | None = None  # (B, tokens seen), in the first layer, for all of them

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Begin with keys and values (B, Hk, N, D) that nothing was dropped of."""
        self.dtype, self.device = keys.dtype, keys.device
        none = keys.new_zeros(*keys.shape[:2], 0)
        self.groups = [HeadGroup(list(range(keys.shape[1])), keys, values, none.long(), 0, none.float())]
        self.keys = self.values = keys.new_empty(0)  # Mllama asks every layer how much these hold
        self.seen = self.new = keys.shape[2]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens; the attention call that follows is this layer's.

        The call is handed everything if nothing was dropped, and what is left of latents, which the model is to expand.
        Otherwise it gets the new ones only, to go by their shapes: what it attends to is found where the call arrives.
        """
        self.settle()
        if not self.block.is_open:
            self._read_after_block()
        if not self.groups:
            self.fill(key_states, value_states)
        else:
            for group in self.groups:
                group.append(key_states[:, group.heads], value_states[:, group.heads])
            self.seen += key_states.shape[2]
        self.new, self.removed, self.before = key_states.shape[2], 0, []
        if not self.dropped or self.is_latent:
            held = self.groups[0].held()
            key_states, value_states = held.keys, held.values
        self.handed = ref(key_states)
        return key_states, value_states

    def settle(self) -> None:
        """Drop what was not to be dropped before it was known which tokens of a pass stay."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending()

    def _read_after_block(self) -> None:
        """Have the attention call that is to come read what is left, if no block is open that will."""
        stack = Stack()
        if any(isinstance(other, Keeper) and other.keeps(stack) for other in interceptors()):
            return
        from regard.cache.after_block import AfterBlock

        if self.after is not None and self.after.is_open:
            self.after.close()
            raise RuntimeError(
                "attention over this compressed cache was not seen: read it within regard.compress(model, policy), with "
                'attn_implementation="sdpa" or "eager"'
            )
        if self.is_shared:
            raise RuntimeError(
                "this cache was compressed, and further layers attend to the keys and values of one of it: read it within "
                "a block, with regard.compress(model, regard.cache.KeepAll())"
            )
        self.window, self.token_ids = [], None  # of tokens that no policy was told of
        self.after = AfterBlock(self)

    def made(self, key: Tensor) -> bool:
        """Whether keys (B, Hq or Hk, N, D) are those that its last update returned, repeated for query heads or not."""
        handed = None if self.handed is None else self.handed()
        if handed is None or key.shape[::2] != handed.shape[::2] or key.shape[3] != handed.shape[3]:
            return False
        own = key[:, :: max(key.shape[1] // handed.shape[1], 1)]
        return own.shape == handed.shape and (own.data_ptr() == handed.data_ptr() or torch.equal(own, handed))

    def take_ids(self, ids: Tensor | None, tokens: int) -> None:
        """Take note of the ids (B, n) of new tokens; those of a text of which some are not known are not known."""
        before, self.token_ids = self.token_ids, None
        if ids is None or ids.shape[1] != tokens:
            return
        if self.seen == tokens:
            self.token_ids = ids
        elif before is not None:
            self.token_ids = torch.cat([before, ids], dim=1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens."""
        self.fill(key_states[:, :, :0], value_states[:, :, :0])

    def entries(
        self, real: Tensor | None, memory: dict[Any, Any], expanded: tuple[Tensor, Tensor] | None = None, **further: Any
    ) -> Entries:
        """What a policy sees of the layer.

        ``real`` (B, tokens so far) tells tokens from padding, ``expanded`` are the keys and values (B, H, L, D) that the
        model has made of latents, the others are fields.
        """
        keys, values, positions, received = (
            self._of_all_heads(name) for name in ("keys", "values", "positions", "received")
        )
        if expanded is not None:
            keys, values = (tensor.transpose(1, 2).flatten(2)[:, None] for tensor in expanded)
        there = positions >= 0
        if real is not None:
            real = real.to(keys.device)
            index = positions.clamp(min=0)
            there = there & real[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return Entries(
            self.rank, self.layers, keys, values, positions, there, received, real, self.seen, memory, **further
        )  # fmt: skip

    def _of_all_heads(self, name: str) -> Tensor:
        """(B, Hk, L, …) of a tensor of the groups; those with fewer entries end in empty slots."""
        longest = max(group.length for group in self.groups)
        parts = []
        for group in self.groups:
            whole = group.whole()
            part = whole.all_positions() if name == "positions" else getattr(whole, name)
            if name == "received" and not part.numel():
                part = torch.zeros(whole.keys.shape[:3], device=part.device)
            if len(self.groups) == 1:
                return part
            padding = [0, 0] * (part.ndim - 3) + [0, longest - group.length]
            parts.append(functional.pad(part, padding, value=-1 if name == "positions" else 0))
        order = torch.tensor([head for group in self.groups for head in group.heads]).argsort()
        return torch.cat(parts, dim=1)[:, order]

    def keep(self, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Drop all but the entries of the highest scores (B, Hk, L), as many of each head as the counts (B, Hk) say.

        With ``in_order`` the entries stay in the order of the text; else the last one may take the place of one that goes.
        """
        self.groups = [group if group.chosen is None else replace(group, chosen=None) for group in self.groups]
        longest, fewest = counts.amax(dim=0).tolist(), counts.amin(dim=0).tolist()
        lost = ((scores > -torch.inf).sum(dim=-1) > counts).any(dim=0).tolist()  # also from a shorter text alone
        done, rest = [], []
        for group in self.groups:
            kept = {longest[head] for head in group.heads} | {fewest[head] for head in group.heads}
            if min(longest[head] for head in group.heads) >= group.length and not any(
                lost[head] for head in group.heads
            ):
                done.append(group)
            elif self._may_replace(in_order) and kept == {group.length - 1} and group.can_replace():
                group.replace(scores[:, group.heads, : group.length].argmin(dim=-1))
                self.dropped_at = self.seen
                done.append(group)
            else:
                rest.append(group)
        if not rest:
            return
        best = scores.argsort(dim=-1, descending=True, stable=True)
        numbers = sorted({(longest[head], group.packed_length) for group in rest for head in group.heads})
        self._remember()
        self.groups = done + [
            _best([group for group in rest if group.packed_length == packed], best, counts, longest, number)
            for number, packed in numbers
        ]
        self.dropped, self.dropped_at = True, self.seen

    def choose(self, scores: Tensor, counts: Tensor) -> None:
        """Have calls read the entries of the highest scores (B, Hk, L) only, as many of each head as counts (B, Hk) say."""
        self._remember()
        best = scores.argsort(dim=-1, descending=True, stable=True)
        self.groups = [
            group.choose(_first(best[:, group.heads], counts[:, group.heads], int(counts[:, group.heads].amax())))
            for group in self.groups
        ]
        self.dropped = True

    def _remember(self) -> None:
        """Hold on to what layers that share these entries are still to read in this pass."""
        self.before = (self.before or self.groups) if self.is_shared else []

    def narrow(self, channels: Tensor, window: int) -> None:
        """Hold these channels (B, Hk, C) alone of all keys but the last ``window`` of each head."""
        self._remember()
        self.groups = [NarrowGroup.of(group, channels[:, group.heads], window) for group in self.groups]
        self.dropped, self.dropped_at = True, self.seen

    def pack(self, real: Tensor, going: Tensor, pack: Callable[[HeadGroup], PackedEntries]) -> None:
        """Keep the ``going`` entries (B, Hk, L) as ``pack`` makes them of a group, and of the others the ``real`` ones."""
        if not bool(going.any()):
            return
        self._remember()
        staying = real & ~going
        numbers = [mask.sum(dim=2).amax(dim=0).tolist() for mask in (staying, going)]
        # Heads by how many of their entries stay, go to be packed, and are packed.
        alike: dict[tuple[int, int, int], list[HeadGroup]] = {}
        for group in self.groups:
            of_group = [(numbers[0][head], numbers[1][head], group.packed_length) for head in group.heads]
            for number in set(of_group):
                places = [place for place, own in enumerate(of_group) if own == number]
                part = _chosen(group, places, staying, number[0])
                if number[1]:
                    new = pack(_chosen(group, places, going, number[1]))
                    part.packed = new if part.packed is None else PackedEntries.joined([part.packed, new], dim=2)
                alike.setdefault(number, []).append(part)
        self.groups = [merge(parts) for parts in alike.values()]
        self.dropped, self.dropped_at = True, self.seen

    def change_values(self, values: Tensor) -> None:
        """Other values (B, Hk, L, D) of the entries, those of all heads in order."""
        if self.is_shared:
            self.before = self.groups  # who attends to them too does so as they were
        self.groups = [group.with_values(values[:, group.heads, : group.length]) for group in self.groups]

    def _may_replace(self, in_order: bool) -> bool:
        """Whether entries may be dropped in place: nobody else is to read them, and their order is nothing to the policy."""
        return self.dropped and not in_order and not self.is_shared

    def forget(self) -> None:
        """Forget what the entries received, and nothing else."""
        for group in self.groups:
            group.received = group.received[:, :, :0]

    def get_seq_length(self) -> int:
        """How many tokens it has seen, dropped ones too."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The model masks all tokens seen; the mask is reduced to those that are left where the call arrives."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """−1: a text may grow without a maximum."""
        return -1

    def reset(self) -> None:
        """Begin anew: forget entries, tokens and what the policy remembers."""
        self.groups, self.state, self.seen, self.steps, self.new = [], {}, 0, 0, 0
        self.dropped = self.is_initialized = self.is_latent = self.is_shared = self.edited = False
        self.recording = self.verifies = False
        self.handed, self.before, self.window, self.whole, self.pending = None, [], [], None, None
        self.dropped_at = self.removed = 0
        self.token_ids = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some texts only."""
        self._rows(lambda tensor: tensor[indices])

    def activate_past_recording(self) -> None:
        """Drop nothing before it is known which tokens of a pass stay: assisted generation takes back those it rejects."""
        self.recording, self.verifies = True, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back so many last tokens, given as a negative number, as assisted generation does.

        Raises:
            NotImplementedError: tokens for which entries were dropped, which cannot be brought back.
        """
        number = abs(tokens_to_remove)
        if not number:
            return
        if self.seen - number < self.dropped_at:
            raise NotImplementedError(
                f"{number} tokens of a compressed cache cannot be taken back: entries were dropped for them; crop it before "
                "regard.compress drops, or copy.deepcopy it"
            )
        for group in self.groups:
            group.remove_last(number)
        self.seen -= number
        self.removed += number
        self.token_ids = None if self.token_ids is None else self.token_ids[:, :-number]
        self.state = {}  # of tokens that are no more; found anew from the keys
        while number and self.window:
            last = self.window.pop()
            if number < last.length:
                self.window.append(last.without_last(number))
            number -= min(number, last.length)

    def offload(self) -> None:
        """Refuse to be moved: an offloaded cache is not adopted."""
        raise NotImplementedError("a compressed cache cannot be offloaded")

    def __getstate__(self) -> dict[str, Any]:
        """To be copied or saved, with what is to be dropped dropped."""
        self.settle()
        return vars(self) | {"handed": None, "before": [], "after": None}

    def numbers(self) -> int:
        """Bytes of keys and values."""
        return sum(group.bytes for group in self.groups)

    def _rows(self, change: Any) -> None:
        for group in self.groups:
            group.change_rows(change)
        self.window = [window.of_rows(change) for window in self.window]
        self.token_ids = None if self.token_ids is None else change(self.token_ids)
        self.state = {name: change(tensor) for name, tensor in self.state.items()}


def _first(order: Tensor, counts: Tensor, number: int) -> Tensor:
    """(B, h, number): the first places of an order (B, h, L), as many as the counts (B, h) say, sorted, −1 for none."""
    empty = torch.arange(number, device=order.device) >= counts[..., None]
    return order[..., :number].masked_fill(empty, -1).sort(dim=-1).values


def _chosen(group: HeadGroup, places: list[int], mask: Tensor, number: int) -> HeadGroup:
    """Heads of a group, by their places in it, with the so many entries that a mask (B, Hk, L) has of each."""
    own = mask[:, group.heads, : group.length][:, places]
    order = own.long().argsort(dim=-1, descending=True, stable=True)[..., :number]
    return group.select(places, order, ~own.gather(2, order))


def _best(groups: list[HeadGroup], best: Tensor, counts: Tensor, longest: list[int], number: int) -> HeadGroup:
    """The heads that keep this number of entries, and those entries, in the order in which they stand."""
    parts = []
    for group in groups:
        places = [place for place, head in enumerate(group.heads) if longest[head] == number]
        if places:
            heads = [group.heads[place] for place in places]
            index = _first(best[:, heads], counts[:, heads], number)
            parts.append(group.select(places, index.clamp(min=0), index < 0))
    return merge(parts)
