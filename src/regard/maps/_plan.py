"""What of the matrix a mask leaves to be visited: strips of queries, each over the runs of keys that it sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from regard.maps._scores import Scores
from regard.masks import Mask, Tiles, Tiling

# Queries and keys in a tile, and numbers in one strip: a buffer that stays in a core's cache, or that keeps a GPU busy.
_TILE = (256, 64)
_STRIP = {"cpu": 3 * 2**18, "cuda": 2**26}
# Tiles that are looked at together, and pairs whose visibility a plan remembers, of which two are kept.
_TILES_AT_ONCE = 2**20
_PAIRS_KEPT = 2**24


class Run(NamedTuple):
    """Neighbouring keys, of which a strip sees all or a part."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class Strip:
    """Some queries of some heads, and the runs of keys that they see, in order.

    It holds all groups of some key heads, in one batch element or in all heads of several; or a single query head.
    ``heads`` are those of keys among all (B · Hk), ``query_heads`` those of queries among all (B · Hq).
    """

    batch: slice
    heads_of_batch: slice
    rows: slice
    runs: tuple[Run, ...]
    groups: int
    heads_in_all: int

    @cached_property
    def heads(self) -> slice:
        return slice(self.query_heads.start // self.groups, (self.query_heads.stop - 1) // self.groups + 1)

    @cached_property
    def query_heads(self) -> slice:
        first, last = self.batch.start * self.heads_in_all, (self.batch.stop - 1) * self.heads_in_all
        return slice(first + self.heads_of_batch.start, last + self.heads_of_batch.stop)

    @cached_property
    def group(self) -> slice:
        """Which of the query heads that share a key head."""
        if _length(self.heads_of_batch) < self.groups:
            first = self.heads_of_batch.start % self.groups
            return slice(first, first + 1)
        return slice(0, self.groups)

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
        return _length(self.heads), _length(self.group), _length(self.rows), self.columns

    def of_queries(self, tensor: Tensor) -> Tensor:
        """This strip's part, (heads, groups, rows, …), of a contiguous (B, Hq, N, …) tensor."""
        return tensor.view(-1, self.groups, *tensor.shape[2:])[self.heads, self.group, self.rows]

    def of_keys(self, tensor: Tensor, per_query_head: bool = False) -> Tensor:
        """This strip's part of a (B · Hk, M, …) tensor, or of a (B · Hq, M, …) one; a view where its keys are one slice."""
        heads = tensor[self.query_heads if per_query_head else self.heads]
        parts = [heads[:, span] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def of_mask(self, mask: Tensor) -> Tensor:
        """This strip's part, (heads|1, groups|1, rows|1, columns|1), of a mask whose dimensions may be 1."""
        parts = (self.batch, self.heads_of_batch, self.rows)
        rows = mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, parts, strict=False))]
        if mask.shape[3] == 1:
            return self.folded(rows)
        columns = [rows[..., span] for span in self.spans]
        return self.folded(columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1))

    def folded(self, tensor: Tensor) -> Tensor:
        """What is (batch|1, query heads|1, …) as (heads|1, groups|1, …)."""
        if tensor.shape[:2] == (1, 1):
            return tensor
        wide = tensor.expand(_length(self.batch), _length(self.heads_of_batch), -1, -1)
        return wide.reshape(_length(self.heads), _length(self.group), *wide.shape[2:])

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
    """Strips for one worker, of the same heads of keys; ``alone``: no other share holds strips of these heads."""

    strips: tuple[Strip, ...]
    alone: bool

    @property
    def heads(self) -> slice:
        return self.strips[0].heads

    @property
    def query_heads(self) -> slice:
        groups = self.strips[0].groups
        return slice(self.heads.start * groups, self.heads.stop * groups)

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

    def __init__(
        self, mask: Mask, shape: tuple[int, int, int, int], groups: int, hidden: float, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.mask, self.dtype, self.groups, self.device = mask, dtype, groups, device
        self._shows, self._hides = torch.tensor([0.0, hidden], dtype=dtype, device=device)
        self.batch, self.heads, self.queries, self.keys = shape
        self._lock = threading.Lock()
        self._patterns: dict[tuple[object, ...], Tensor] = {}
        self._room = _PAIRS_KEPT
        self._runs = self._find_runs()

    def shares(self, workers: int) -> list[Share]:
        """The strips, divided for so many workers, the largest shares first."""
        bundles = list(self._bundles())
        pieces = max(1, 2 * workers // max(1, len(bundles))) if workers > 1 else 1
        shares = []
        for strips in bundles:
            parts = _divide(strips, pieces)
            shares += [Share(part, alone=len(parts) == 1) for part in parts]
        return sorted(shares, key=lambda share: -share.cost)

    def strips(self) -> Iterator[Strip]:
        """All of them."""
        for strips in self._bundles():
            yield from strips

    def biases(self, strip: Strip) -> Iterator[tuple[slice, Tensor]]:
        """Columns in which the mask hides some keys, and what hides them: (heads|1, groups|1, rows, columns)."""
        start = 0
        for run in strip.runs:
            stop = start + run.stop - run.start
            if not run.full:
                yield slice(start, stop), strip.folded(self._pattern(strip, run))
            start = stop

    def _pattern(self, strip: Strip, run: Run) -> Tensor:
        if self.mask.is_relative:  # the same along a diagonal
            key: tuple[object, ...] = (strip.rows.start - run.start, _length(strip.rows), run.stop - run.start)
        else:
            batch = strip.batch.start if self._per_batch else None
            head = strip.heads_of_batch.start if self._per_head else None
            key = (batch, head, strip.rows.start, run.start)
        pattern = self._patterns.get(key)
        if pattern is None:
            visible = self.mask.visible(
                self._range(strip.batch)[:, None, None, None],
                self._range(strip.heads_of_batch)[:, None, None],
                self._range(strip.rows)[:, None],
                self._range(slice(run.start, run.stop)),
            )
            # Adding is many times as fast as filling where a mask says so.
            pattern = torch.where(visible, self._shows, self._hides)
            pattern = pattern.reshape((1,) * (4 - pattern.ndim) + pattern.shape)
            with self._lock:
                if pattern.numel() <= self._room and key not in self._patterns and type(pattern) is Tensor:
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

    def _bundles(self) -> Iterator[list[Strip]]:
        """The strips of batch elements and heads of keys that are taken together."""
        columns = max(
            sum(run.stop - run.start for run in runs) for of_b in self._runs for of_h in of_b for runs in of_h
        )
        rows = min(_TILE[0], self.queries)
        room = max(1, _STRIP.get(self.device.type, _STRIP["cuda"]) // (rows * max(1, columns)))
        key_heads = self.heads // self.groups
        heads_at_once = 1 if self._per_head else max(1, min(key_heads, room // self.groups))
        batch_at_once = 1 if self._per_batch or self._per_head else max(1, min(self.batch, room // self.heads))
        for b in _slices(self.batch, batch_at_once):
            for h in _slices(self.heads, heads_at_once * self.groups):
                strips = list(self._strips_of(b, h))
                if strips:
                    yield strips

    def _strips_of(self, batch: slice, heads: slice) -> Iterator[Strip]:
        of_batch = self._runs[batch.start if self._per_batch else 0]
        apart = [slice(h, h + 1) for h in range(heads.start, heads.stop)] if self._per_head else [heads]
        for tile, rows in enumerate(_slices(self.queries, _TILE[0])):
            for some in apart:
                runs = of_batch[some.start if self._per_head else 0][tile]
                if runs:
                    yield Strip(batch, some, rows, runs, self.groups, self.heads)


@dataclass(frozen=True)
class _Rule:
    """A mask that is told from others by its settings."""

    settings: tuple[object, ...]
    mask: Mask = field(compare=False)


def plan_of(scores: Scores, mask: Mask, hidden: float, dtype: torch.dtype) -> Plan:
    """The plan of a call. That of a rule made of numbers alone is kept: the next layer or step asks for the same."""
    call = (scores.shape, scores.groups, hidden, dtype, scores.query.device)
    settings = mask.settings
    return Plan(mask, *call) if settings is None else _kept(_Rule(settings, mask), *call)


@lru_cache(maxsize=2)
def _kept(
    rule: _Rule, shape: tuple[int, int, int, int], groups: int, hidden: float, dtype: torch.dtype, device: torch.device
) -> Plan:
    return Plan(rule.mask, shape, groups, hidden, dtype, device)


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
