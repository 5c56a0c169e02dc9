"""Tiles of the matrix of pairs: which hold no visible pair, which hold only visible ones, and which must be looked into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tiling:
    """The positions of the tokens in each tile: of a call, or of a part of it.

    ``batch`` is (B, 1, 1, 1) and ``head`` (1, H, 1, 1); ``query`` (1, 1, query tiles, tokens) and ``key`` (1, 1, key tiles,
    tokens). Where the last tile is short, its last token stands there again.
    """

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor

    @staticmethod
    def of_call(batch: int, heads: int, queries: Tensor, keys: Tensor, tile: tuple[int, int]) -> Tiling:
        """The tiles of a call, ``tile`` queries by keys, from the position of each of its queries and keys."""
        return Tiling(
            torch.arange(batch, device=queries.device)[:, None, None, None],
            torch.arange(heads, device=queries.device)[None, :, None, None],
            _in_tiles(queries, tile[0]),
            _in_tiles(keys, tile[1]),
        )

    def query_span(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest of a feature in each tile of queries: (B|1, H|1, query tiles, 1)."""
        return feature.amin(dim=-1, keepdim=True), feature.amax(dim=-1, keepdim=True)

    def key_span(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest of a feature in each tile of keys: (B|1, H|1, 1, key tiles)."""
        return feature.amin(dim=-1).unsqueeze(-2), feature.amax(dim=-1).unsqueeze(-2)


def _in_tiles(positions: Tensor, size: int) -> Tensor:
    tiles = -(-len(positions) // size)
    last = positions[-1:].expand(tiles * size - len(positions))
    return torch.cat([positions, last]).view(1, 1, tiles, size)


@dataclass(frozen=True, eq=False)
class Tiles:
    """What is known of each tile, three booleans that broadcast to (B, H, query tiles, key tiles).

    ``seen``: some pair may see each other; ``hidden``: some pair may be hidden; ``certain``: both are as they say. A tile
    that is not ``seen`` is empty, one that is not ``hidden`` is full, and both are always certain.
    """

    seen: Tensor
    hidden: Tensor
    certain: Tensor

    @property
    def empty(self) -> Tensor:
        """Tiles without a visible pair."""
        return ~self.seen

    @property
    def full(self) -> Tensor:
        """Tiles of visible pairs alone."""
        return ~self.hidden

    @property
    def partial(self) -> Tensor:
        """Tiles that are neither known to be empty nor known to be full."""
        return self.seen & self.hidden

    def __invert__(self) -> Tiles:
        return Tiles(self.hidden, self.seen, self.certain)

    def __and__(self, other: Tiles) -> Tiles:
        seen, hidden = self.seen & other.seen, self.hidden | other.hidden
        certain = ~seen | ~hidden | (self.full & other.certain) | (other.full & self.certain)
        return Tiles(seen, hidden, certain)

    def __or__(self, other: Tiles) -> Tiles:
        return ~(~self & ~other)


def known(seen: Tensor, full: Tensor, certain: bool) -> Tiles:
    """Tiles from where a pair may be seen and where all are; ``certain``: whether the others are surely partial."""
    hidden = ~full
    surely = torch.ones_like(seen & full) if certain else ~seen | full
    return Tiles(seen, hidden, surely)
