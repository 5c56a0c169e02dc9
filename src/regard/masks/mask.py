"""Mask: a rule that says which pairs of positions see each other, and its algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.masks.tiles import Tiles, Tiling

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_DENSE_LIMIT = 2**28
_PAIRS_AT_ONCE = 2**19


class Mask(ABC):
    """Which queries see which keys, as a rule on (batch, head, query, key) positions that is never written out as a matrix.

    Positions are those in the text: a call on a part of it says where its first query and key stand (`offset`). Masks are
    combined with ``&``, ``|`` and ``~``; `regard.attention` and `regard.AttentionMap` take them as ``mask=``.

    A subclass gives `visible` and `tiles_of`; a frozen dataclass moves to other devices with its tensors.

    >>> from regard import masks
    >>> masks.window(left=2, right=0) | ~masks.causal()
    window(left=2, right=0) | ~causal()
    >>> masks.causal().dense(1, 1, 3, 3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    @abstractmethod
    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The rule: boolean, from integer positions of shapes that broadcast; no larger than those it depends on."""

    @abstractmethod
    def tiles_of(self, tiling: Tiling) -> Tiles:
        """What is known of each tile without looking at its pairs."""

    @property
    def is_relative(self) -> bool:
        """Whether the rule depends on the distance ``query − key`` alone, so that tiles on a diagonal are alike."""
        return False

    @property
    def settings(self) -> tuple[object, ...] | None:
        """Its kind and its numbers, where it is made of nothing else: rules with equal settings are the same rule.

        None for rules of tensors or functions, which may change, and for those of other classes than frozen dataclasses.

        >>> from regard import masks
        >>> masks.window(2, 0).settings == masks.window(2, 0).settings, masks.documents([3, 4]).settings
        (True, None)
        """
        parameters = vars(type(self)).get("__dataclass_params__")
        names = [field.name for field in fields(self)] if parameters is not None and parameters.frozen else None  # type: ignore[arg-type]
        if names is None or vars(self).keys() != set(names):
            return None
        settings = [_settings(getattr(self, name)) for name in names]
        return None if _UNKNOWN in settings else (type(self), *settings)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:  # noqa: B027 - most rules hold anywhere
        """Raise ValueError if the rule is not defined for as many; ``queries`` and ``keys`` count from the text's begin."""

    def offset(self, query_start: int = 0, key_start: int = 0) -> Mask:
        """The mask of a call whose first query and key are not the first of their text, as in a step of decoding.

        >>> from regard import masks
        >>> masks.window(left=2, right=0).offset(query_start=4).dense(1, 1, 1, 5).int()
        tensor([[[[0, 0, 1, 1, 1]]]], dtype=torch.int32)
        """
        if min(query_start, key_start) < 0:
            raise ValueError(f"positions count from 0, got query_start={query_start} and key_start={key_start}")
        return Offset(self, query_start, key_start) if query_start or key_start else self

    def heads(self, index: Sequence[int]) -> Mask:
        """The mask whose head h is this one's head ``index[h]``."""
        return Heads(self, torch.as_tensor(index, dtype=torch.long))

    def to(self, device: torch.device | str) -> Mask:
        """The mask with its tensors on a device."""
        if not is_dataclass(self):
            return self
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor | Mask)}
        return replace(self, **moved) if any(moved[name] is not parts[name] for name in moved) else self

    # --- algebra ------------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    # --- forms --------------------------------------------------------------------------------------------------------

    def tiles(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        tile: int | tuple[int, int] = 128,
        device: torch.device | str = "cpu",
    ) -> Tiles:
        """Which tiles of a call are empty, full or partial, (B|1, H|1, query tiles, key tiles) each, exactly.

        Found from the rule's structure; pairs are only evaluated in tiles where that leaves a doubt.

        >>> from regard import masks
        >>> tiles = masks.window(left=4, right=0).tiles(1, 1, 16, 16, tile=4)
        >>> tiles.partial[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        self.check(batch, heads, queries, keys)
        sizes = tile if isinstance(tile, tuple) else (tile, tile)
        if min(sizes) < 1:
            raise ValueError(f"a tile has at least one query and one key, got {sizes}")
        positions = torch.arange(max(queries, keys), device=device)
        tiling = Tiling.of_call(batch, heads, positions[:queries], positions[:keys], sizes)
        mask = self.to(device)
        return mask.looked_into(tiling, mask.tiles_of(tiling))

    def looked_into(self, tiling: Tiling, tiles: Tiles) -> Tiles:
        """The tiles, (B|1, H|1, query tiles, key tiles), every doubt settled by evaluating the pairs of those in doubt."""
        parts = (tiles.seen, tiles.hidden, tiles.certain)
        every = (tiling.query.shape[2], tiling.key.shape[2])
        shape = torch.broadcast_shapes(every, *(part.shape for part in parts))
        seen, hidden, certain = (part.expand(shape) for part in parts)
        doubtful = (~certain).nonzero()
        if not len(doubtful):
            return Tiles(seen, hidden, certain)
        seen, hidden = seen.clone(), hidden.clone()
        pairs = tiling.query.shape[-1] * tiling.key.shape[-1]
        for some in doubtful.split(max(1, _PAIRS_AT_ONCE // pairs)):
            b, h, row, column = some.unbind(dim=-1)
            batch, head = tiling.batch.flatten()[b], tiling.head.flatten()[h]
            query, key = tiling.query[0, 0, row], tiling.key[0, 0, column]
            view = self.visible(batch[:, None, None], head[:, None, None], query[:, :, None], key[:, None, :])
            view = view.expand(len(some), query.shape[-1], key.shape[-1]).flatten(1)
            seen[b, h, row, column] = view.any(dim=-1)
            hidden[b, h, row, column] = ~view.all(dim=-1)
        return Tiles(seen, hidden, torch.ones_like(certain))

    def dense(self, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
        """The mask written out, (B, H, N, M) boolean (True: visible), for small sizes: refused above 2²⁸ entries."""
        self.check(batch, heads, queries, keys)
        if batch * heads * queries * keys > _DENSE_LIMIT:
            raise ValueError(
                f"a mask of shape {(batch, heads, queries, keys)} takes {batch * heads * queries * keys / 2**30:.1f} GiB; "
                "ask for tiles(), or pass the mask itself as mask="
            )
        b, h, q, k = (torch.arange(size, device=device) for size in (batch, heads, queries, keys))
        view = self.to(device).visible(b[:, None, None, None], h[None, :, None, None], q[:, None], k)
        return view.expand(batch, heads, queries, keys)

    @property
    def mask_mod(self) -> MaskMod:
        """The rule as FlexAttention takes it: a function of (batch, head, query, key), right under ``vmap`` too.

        >>> from regard import masks
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> create_block_mask(masks.causal().mask_mod, None, None, 256, 256, device="cpu").shape
        (1, 1, 256, 256)
        """

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.visible(batch, head, query, key)

        return mask_mod

    def block_mask(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """FlexAttention's BlockMask, made from the tiles, without evaluating N×M pairs as ``create_block_mask`` does.

        Its batch and heads are 1 where the rule does not depend on them.
        """
        from torch.nn.attention.flex_attention import BlockMask

        sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        tiles = self.tiles(batch, heads, queries, keys, sizes, device)
        full = tiles.full.clone()
        # As in create_block_mask, a block that reaches beyond the text is not full.
        if queries % sizes[0]:
            full[..., -1, :] = False
        if keys % sizes[1]:
            full[..., -1] = False
        some, every = _in_order(tiles.seen & ~full), _in_order(full)
        return BlockMask.from_kv_blocks(
            *some, *every, BLOCK_SIZE=sizes, mask_mod=self.to(device).mask_mod, seq_lengths=(queries, keys)
        )


_UNKNOWN = object()


def _settings(value: object) -> object:
    if isinstance(value, tuple):
        parts = tuple(_settings(part) for part in value)
        return _UNKNOWN if _UNKNOWN in parts else parts
    if isinstance(value, Mask):
        return value.settings or _UNKNOWN
    return value if value is None or isinstance(value, int) else _UNKNOWN


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are true, and their columns, these first."""
    columns = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), columns.to(torch.int32)


@dataclass(frozen=True, eq=False, repr=False)
class _Pair(Mask):
    """Two masks combined."""

    left: Mask
    right: Mask

    @property
    def is_relative(self) -> bool:
        """Whether both are."""
        return self.left.is_relative and self.right.is_relative

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Check both."""
        self.left.check(batch, heads, queries, keys)
        self.right.check(batch, heads, queries, keys)


@dataclass(frozen=True, eq=False, repr=False)
class And(_Pair):
    """Pairs that both masks show."""

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A pair that both rules let see."""
        return self.left.visible(batch, head, query, key) & self.right.visible(batch, head, query, key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the tiles of both."""
        return self.left.tiles_of(tiling) & self.right.tiles_of(tiling)

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.left, self.right))


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Pair):
    """Pairs that either mask shows."""

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """A pair that either rule lets see."""
        return self.left.visible(batch, head, query, key) | self.right.visible(batch, head, query, key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the tiles of both."""
        return self.left.tiles_of(tiling) | self.right.tiles_of(tiling)

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


@dataclass(frozen=True, eq=False, repr=False)
class _Changed(Mask):
    """A mask seen in another way."""

    mask: Mask

    @property
    def is_relative(self) -> bool:
        """Whether the mask is."""
        return self.mask.is_relative

    @property
    def _inner(self) -> str:
        return f"({self.mask!r})" if isinstance(self.mask, _Pair) else repr(self.mask)


@dataclass(frozen=True, eq=False, repr=False)
class Not(_Changed):
    """Pairs that a mask hides."""

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The rule turned round."""
        return ~self.mask.visible(batch, head, query, key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """Empty and full in each other's place."""
        return ~self.mask.tiles_of(tiling)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Check the mask."""
        self.mask.check(batch, heads, queries, keys)

    def __repr__(self) -> str:
        return f"~{self._inner}"


@dataclass(frozen=True, eq=False, repr=False)
class Offset(_Changed):
    """A mask for a call whose first query and key stand further on in the text."""

    query_start: int
    key_start: int

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The rule at positions in the text."""
        return self.mask.visible(batch, head, query + self.query_start, key + self.key_start)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """The tiles at positions in the text."""
        moved = replace(tiling, query=tiling.query + self.query_start, key=tiling.key + self.key_start)
        return self.mask.tiles_of(moved)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Check up to the last positions."""
        self.mask.check(batch, heads, queries + self.query_start, keys + self.key_start)

    def __repr__(self) -> str:
        inner = f"({self._inner})" if isinstance(self.mask, Not) else self._inner
        return f"{inner}.offset(query_start={self.query_start}, key_start={self.key_start})"


@dataclass(frozen=True, eq=False, repr=False)
class Heads(_Changed):
    """A mask for a call on some of the heads."""

    index: Tensor

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The rule of the heads chosen."""
        return self.mask.visible(batch, self.index[head], query, key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """The tiles of the heads chosen."""
        return self.mask.tiles_of(replace(tiling, head=self.index[tiling.head]))

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Check up to the last head chosen."""
        if heads != len(self.index):
            raise ValueError(f"the mask is one of {len(self.index)} chosen heads, but the call has {heads}")

    def __repr__(self) -> str:
        inner = f"({self._inner})" if isinstance(self.mask, Not) else self._inner
        return f"{inner}.heads({self.index.tolist()})"
