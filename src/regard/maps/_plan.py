"""What of the matrix a mask leaves to be visited: strips of queries, each over the runs of keys that it sees."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from regard.maps._scores import Scores
from regard.masks import Mask, Tiles, Tiling

# Queries and keys in a tile, and numbers in one strip: a buffer that stays in a core's cache, or that keeps a GPU busy.
_TILE = (256, 64)
_STRIP = {"cpu": 3 * 2**18, "cuda": 2**26}
# Hides a logit, and times a probability of 0 gives 0, which −inf would not.
_HIDDEN = -1e30
# Tiles that are looked at together, and pairs whose visibility is remembered.
_TILES_AT_ONCE = 2**20
_PAIRS_KEPT = 2**25


class Run(NamedTuple):
    """Neighbouring keys, of which a strip sees all or a part."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class Strip:
    """Some queries of some heads, and the runs of keys that they see, in order."""

    batch: slice
    query_heads: slice
    key_heads: slice
    rows: slice
    runs: tuple[Run, ...]

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """The keys in as few slices as they fill."""
        spans: list[slice] = []
        for run in self.runs:
            if spans and spans[-1].stop == run.start:
                spans[-1] = slice(spans[-1].start, run.stop)
            else:
                spans.append(slice(run.start, run.stop))
        return tuple(spans)

    @cached_property
    def columns(self) -> int:
        """The number of keys."""
        return sum(run.stop - run.start for run in self.runs)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return _length(self.batch), _length(self.query_heads), _length(self.rows), self.columns

    def of_queries(self, tensor: Tensor) -> Tensor:
        """This strip's part of a (B, Hq, N, …) tensor."""
        return tensor[self.batch, self.query_heads, self.rows]

    def of_keys(self, tensor: Tensor, per_query_head: bool = False) -> Tensor:
        """This strip's part of a (B, Hk, M, …) tensor, or of a (B, Hq, M, …) one; a view where its keys are one slice."""
        heads = tensor[self.batch, self.query_heads if per_query_head else self.key_heads]
        parts = [heads[:, :, span] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def of_mask(self, mask: Tensor) -> Tensor:
        """This strip's part of a mask whose dimensions may be 1."""
        parts = (self.batch, self.query_heads, self.rows)
        rows = mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, parts, strict=False))]
        if mask.shape[3] == 1:
            return rows
        columns = [rows[..., span] for span in self.spans]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def positions(self, device: torch.device) -> Tensor:
        """The key of each column."""
        return torch.cat([torch.arange(span.start, span.stop, device=device) for span in self.spans])

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Each slice of keys, with its columns in the strip."""
        start = 0
        for span in self.spans:
            stop = start + span.stop - span.start
            yield span, slice(start, stop)
            start = stop


@dataclass(frozen=True, eq=False)
class Share:
    """Strips for one worker, of the same heads; ``alone``: no other share holds strips of these heads."""

    batch: slice
    query_heads: slice
    key_heads: slice
    strips: tuple[Strip, ...]
    alone: bool

    @property
    def cost(self) -> int:
        return sum(_length(strip.rows) * strip.columns for strip in self.strips)

    @cached_property
    def keys(self) -> slice:
        """All that lie between the first key that it sees and the last."""
        first = min(strip.runs[0].start for strip in self.strips)
        return slice(first, max(strip.runs[-1].stop for strip in self.strips))


class Plan:
    """Strips that cover every visible pair of a call once, in which hidden pairs are found by evaluating the mask."""

    def __init__(self, scores: Scores, mask: Mask, dtype: torch.dtype) -> None:
        self.mask, self.dtype = mask, dtype
        # Beside an additive mask, whose entries may be as low, hidden pairs are at −inf.
        additive = scores.mask is not None and scores.mask.is_floating_point()
        self.hides = -math.inf if additive else _HIDDEN
        self._shows, self._hides = torch.tensor([0.0, self.hides], dtype=dtype, device=scores.query.device)
        self.batch, self.heads, self.queries, self.keys = scores.shape
        self.groups = scores.groups
        self.device = scores.query.device
        self._lock = threading.Lock()
        self._patterns: dict[tuple[object, ...], Tensor] = {}
        self._room = _PAIRS_KEPT
        self._runs = self._find_runs()

    def shares(self, workers: int) -> list[Share]:
        """The strips, divided for so many workers, the largest shares first."""
        bundles = list(self._bundles())
        pieces = max(1, 2 * workers // max(1, len(bundles))) if workers > 1 else 1
        shares = []
        for batch, key_heads, strips in bundles:
            parts = _divide(strips, pieces)
            query_heads = self._query_heads(key_heads)
            shares += [Share(batch, query_heads, key_heads, part, alone=len(parts) == 1) for part in parts]
        return sorted(shares, key=lambda share: -share.cost)

    def strips(self) -> Iterator[Strip]:
        """All of them."""
        for _, _, strips in self._bundles():
            yield from strips

    def biases(self, strip: Strip) -> Iterator[tuple[slice, Tensor]]:
        """Columns in which the mask hides some keys, and what hides them: 0 or `hides`, (batch|1, heads|1, rows, columns)."""
        start = 0
        for run in strip.runs:
            stop = start + run.stop - run.start
            if not run.full:
                yield slice(start, stop), self._pattern(strip, run)
            start = stop

    def _pattern(self, strip: Strip, run: Run) -> Tensor:
        if self.mask.is_relative:  # the same along a diagonal
            key: tuple[object, ...] = (strip.rows.start - run.start, _length(strip.rows), run.stop - run.start)
        else:
            batch = strip.batch.start if self._per_batch else None
            head = strip.query_heads.start if self._per_head else None
            key = (batch, head, strip.rows.start, run.start)
        pattern = self._patterns.get(key)
        if pattern is None:
            visible = self.mask.visible(
                self._range(strip.batch)[:, None, None, None],
                self._range(strip.query_heads)[:, None, None],
                self._range(strip.rows)[:, None],
                self._range(slice(run.start, run.stop)),
            )
            # Adding is many times as fast as filling where a mask says so.
            pattern = torch.where(visible, self._shows, self._hides)
            with self._lock:
                if pattern.numel() <= self._room and key not in self._patterns:
                    self._room -= pattern.numel()
                    self._patterns[key] = pattern
        return pattern

    def _range(self, part: slice) -> Tensor:
        return torch.arange(part.start, part.stop, device=self.device)

    def _find_runs(self) -> list[list[list[tuple[Run, ...]]]]:
        """For each batch element and head (one for all, where the mask does not tell them apart) those of each tile."""
        positions = torch.arange(max(self.queries, self.keys), device=self.device)
        queries, keys = positions[: self.queries], positions[: self.keys]
        at_once = max(1, _TILES_AT_ONCE * _TILE[1] // self.keys) * _TILE[0]
        parts = []
        for some in queries.split(at_once):
            tiling = Tiling.of_call(self.batch, self.heads, some, keys, _TILE)
            parts.append(_states(self.mask.looked_into(tiling, self.mask.tiles_of(tiling))))
        states = torch.cat(parts, dim=2)
        self._per_batch, self._per_head = states.shape[0] > 1, states.shape[1] > 1
        flat = iter(_runs_of(states.flatten(0, 2), self.keys))
        return [[[next(flat) for _ in range(states.shape[2])] for _ in range(states.shape[1])] for _ in states]

    def _bundles(self) -> Iterator[tuple[slice, slice, list[Strip]]]:
        """Batch elements and heads of keys that are taken together, and the strips that see them."""
        columns = max(
            sum(run.stop - run.start for run in runs) for of_b in self._runs for of_h in of_b for runs in of_h
        )
        rows = min(_TILE[0], self.queries)
        room = max(1, _STRIP.get(self.device.type, _STRIP["cuda"]) // (rows * max(1, columns)))
        key_heads = self.heads // self.groups
        heads_at_once = 1 if self._per_head else max(1, min(key_heads, room // self.groups))
        batch_at_once = 1 if self._per_batch or self._per_head else max(1, min(self.batch, room // self.heads))
        for b in _slices(self.batch, batch_at_once):
            for h in _slices(key_heads, heads_at_once):
                strips = list(self._strips_of(b, h))
                if strips:
                    yield b, h, strips

    def _query_heads(self, key_heads: slice) -> slice:
        return slice(key_heads.start * self.groups, key_heads.stop * self.groups)

    def _strips_of(self, batch: slice, key_heads: slice) -> Iterator[Strip]:
        of_batch = self._runs[batch.start if self._per_batch else 0]
        query_heads = self._query_heads(key_heads)
        apart = [slice(h, h + 1) for h in range(query_heads.start, query_heads.stop)]
        for tile, rows in enumerate(_slices(self.queries, _TILE[0])):
            for heads in apart if self._per_head else [query_heads]:
                runs = of_batch[heads.start if self._per_head else 0][tile]
                if runs:
                    yield Strip(batch, heads, key_heads, rows, runs)


def _states(tiles: Tiles) -> Tensor:
    """0 for empty tiles, 1 for partial ones, 2 for full ones: (B|1, H|1, query tiles, key tiles)."""
    return tiles.seen.to(torch.int8) + (tiles.seen & tiles.full)


def _runs_of(states: Tensor, keys: int) -> list[tuple[Run, ...]]:
    """For each row of tiles (rows, key tiles) its runs of tiles alike."""
    begins = torch.ones_like(states, dtype=torch.bool)
    begins[:, 1:] = states[:, 1:] != states[:, :-1]
    row, tile = begins.nonzero().unbind(dim=-1)
    state = states[row, tile]
    stop = torch.cat([tile[1:], tile.new_zeros(1)])
    stop[stop == 0] = states.shape[1]
    found: list[list[Run]] = [[] for _ in range(len(states))]
    for r, start, end, kind in zip(row.tolist(), tile.tolist(), stop.tolist(), state.tolist(), strict=True):
        if kind:
            found[r].append(Run(start * _TILE[1], min(end * _TILE[1], keys), kind == 2))
    return [tuple(runs) for runs in found]


def _divide(strips: Sequence[Strip], pieces: int) -> list[tuple[Strip, ...]]:
    """Neighbouring strips in parts of about the same cost."""
    costs = [_length(strip.rows) * strip.columns for strip in strips]
    parts: list[list[Strip]] = [[] for _ in range(pieces)]
    total, before = sum(costs), 0
    for strip, cost in zip(strips, costs, strict=True):
        parts[min(pieces - 1, before * pieces // total)].append(strip)
        before += cost
    return [tuple(part) for part in parts if part]


def _slices(size: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, size)) for start in range(0, size, at_once)]


def _length(part: slice) -> int:
    return int(part.stop - part.start)
