"""The portable kernel: strips of complete rows, one after another, in a buffer that stays in a core's cache.

A strip holds a few query rows over all the keys they may see, so its softmax is exact in one pass and everything asked
of the matrix — products from either side, entropy — is read from it before the next strip overwrites it. Memory is
O(M · strip), whatever N is. It beats the online form, which must rescale its sums and needs a second pass for columns.

Batch and key heads are one dimension here: tensors of queries are (heads, groups, N, …), where groups are the query heads
that share a key head, those of keys (heads, M, …), and a strip is (heads, groups, rows, columns).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.maps import _strip_pass, _workers
from regard.maps._request import Answer, Request
from regard.maps._scores import Scores
from regard.maps._strip import add_blocks, add_distances, answer, backward, capped, hide
from regard.maps._strip_pass import Gradients, Rows, softmax

# Numbers in one strip: of lower ones a CPU's products are slower than they gain by the cache; or they keep a GPU busy.
_STRIP = {"cpu": 2**19, "cuda": 2**26}
# Rows of all groups in a strip: with fewer a product is slow, with more a triangle's upper half is wasted on.
_ROWS_AT_LEAST, _ROWS_AT_MOST = 64, 128
# Pieces that workers take one after another: as many as leave no core idle for long at the end.
_PIECES = 16


@dataclass(frozen=True)
class Strip:
    """Some rows of some heads: slices of (batch · key heads) and of the queries, and the number of keys in reach."""

    heads: slice
    rows: slice
    columns: int
    groups: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.heads.stop - self.heads.start, self.groups, self.rows.stop - self.rows.start, self.columns

    @property
    def bounds(self) -> list[int]:
        """Its first row, the row that follows its last, and its columns."""
        return [self.rows.start, self.rows.stop, self.columns]

    def of_queries(self, tensor: Tensor) -> Tensor:
        """This strip's part, (heads, groups, rows, …), of a contiguous (B, Hq, N, …) tensor."""
        return tensor.view(-1, self.groups, *tensor.shape[2:])[self.heads, :, self.rows]


@dataclass(frozen=True)
class Piece:
    """Rows of some heads, which one worker takes strip by strip: the ``number``-th of so many parts of their rows."""

    heads: slice
    rows: slice
    number: int


def pieces(scores: Scores, head_by_head: bool = False) -> list[Piece]:
    """Cut the matrix into pieces, the largest first; how, depends on its shape alone."""
    batch, _, queries, keys = scores.shape
    heads, groups, room = batch * scores.key.shape[1], scores.groups, _room(scores)
    at_once, parts = 1, 1
    if not head_by_head:
        rows = min(queries, _rows_at_most(scores)) if _on_gpu(scores) else queries
        at_once = min(heads, max(1, room // (groups * rows * keys)))
    if at_once == 1 and not _on_gpu(scores):
        parts = max(1, min(-(-_PIECES // heads), groups * queries * keys // (2 * room)))
    rows = -(-queries // parts)
    return [
        Piece(slice(head, min(head + at_once, heads)), slice(start, min(start + rows, queries)), start // rows)
        for start in reversed(range(0, queries, rows))
        for head in range(0, heads, at_once)
    ]


def strips(scores: Scores, piece: Piece) -> Iterator[Strip]:
    """Cut a piece into strips that fit the buffer."""
    keys, groups = scores.shape[3], scores.groups
    room = _room(scores) // (groups * (piece.heads.stop - piece.heads.start))
    most = _rows_at_most(scores)
    stop = piece.rows.start
    while stop < piece.rows.stop:
        start = stop
        reach = min(start + most, keys) if scores.is_causal else keys
        stop = min(start + max(1, _ROWS_AT_LEAST // groups, min(most, room // reach)), piece.rows.stop)
        yield Strip(piece.heads, slice(start, stop), min(stop, keys) if scores.is_causal else keys, groups)


def _rows_at_most(scores: Scores) -> int:
    """Queries in a strip; on a GPU only a triangle limits them."""
    if _on_gpu(scores) and not scores.is_causal:
        return scores.shape[2]
    return max(1, _ROWS_AT_MOST // scores.groups)


def _on_gpu(scores: Scores) -> bool:
    return scores.query.device.type != "cpu"


def _room(scores: Scores) -> int:
    return _STRIP["cuda" if _on_gpu(scores) else "cpu"]


def _do(function: Callable[[Piece], None], of_all: list[Piece], together: bool) -> None:
    """Do every piece: by the workers, or one after another."""
    if together:
        _workers.each(function, of_all)
    else:
        for piece in of_all:
            function(piece)


def total_of_parts(parts: Tensor) -> Tensor:
    """The sum over the parts of all queries, in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


class Workspace(_strip_pass.Workspace):
    """One call's tensors, of which pieces take parts."""

    @property
    def triangle(self) -> Tensor | None:
        """What hides the later keys of a causal call."""
        return _triangle(self.units.hidden, self.dtype, self.query.device) if self.scores.is_causal else None

    def of_queries(self, tensor: Tensor | None, piece: Piece) -> Tensor | None:
        """The part of the piece's heads, (heads, groups, N, …), of a contiguous (B, Hq, N, …) tensor."""
        return None if tensor is None else tensor.view(-1, self.scores.groups, *tensor.shape[2:])[piece.heads]

    def of_key_heads(self, tensor: Tensor | None, piece: Piece) -> Tensor | None:
        """The part of the piece's heads of a (B · Hk, M, …) or (B · Hq, M, …) tensor."""
        if tensor is None or len(tensor) == len(self.key):
            return None if tensor is None else tensor[piece.heads]
        groups = self.scores.groups
        return tensor[piece.heads.start * groups : piece.heads.stop * groups]

    def of_mask(self, mask: Tensor | None, piece: Piece) -> Tensor | None:
        """The part of the piece's heads, of sizes that may be 1, of a mask or of its gradient: a view if it is one head."""
        if mask is None:
            return None
        mask = mask.unflatten(1, (-1, self.scores.groups) if mask.shape[1] > 1 else (1, 1))
        if mask.shape[0] == mask.shape[1] == 1:
            return mask[0]
        key_heads = self.scores.key.shape[1]
        if piece.heads.stop - piece.heads.start == 1:
            batch, head = divmod(piece.heads.start, key_heads)
            return mask[batch % mask.shape[0], head % mask.shape[1]].unsqueeze(0)
        heads = torch.arange(piece.heads.start, piece.heads.stop, device=mask.device)
        return mask[heads // key_heads % mask.shape[0], heads % key_heads % mask.shape[1]]

    def buffers(self, strips: list[Strip], number: int) -> list[Tensor]:
        """Uninitialised room for any of these strips, so many times; each thread has its own, and keeps it for the call."""
        size = max(math.prod(strip.shape) for strip in strips)
        kept: list[Tensor] = getattr(self.of_thread, "buffers", [])
        if len(kept) < number or kept[0].numel() < size:
            kept = self.of_thread.buffers = [self.query.new_empty(size) for _ in range(number)]
        return kept[:number]

    def sums_over_queries(self, of_all: list[Piece], *shape: int) -> Tensor:
        """Zeros for each part of the queries, since several workers add to them at once."""
        return self.query.new_zeros(1 + max(piece.number for piece in of_all), *shape)


@lru_cache(maxsize=8)
def _triangle(hidden: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides the part of a causal strip's last columns that lies above the diagonal."""
    return torch.full((1, 1, _ROWS_AT_MOST, _ROWS_AT_MOST), hidden, dtype=dtype, device=device).triu_(1)


def _room_for(buffer: Tensor, query: Tensor, rows: int, columns: int) -> Tensor:
    """A buffer's part for a strip of so many rows and columns."""
    heads, groups = query.size(0), query.size(1)
    return buffer[: heads * groups * rows * columns].view(heads, groups, rows, columns)


def _hiding(triangle: Tensor | None, start: int, stop: int, columns: int) -> tuple[list[int], list[Tensor]]:
    """What hides the columns of a causal strip that lie above the diagonal."""
    starts: list[int] = []
    biases: list[Tensor] = []
    if triangle is not None and columns > start:
        starts.append(start)
        biases.append(triangle[:, :, : stop - start, : columns - start])
    return starts, biases


def _rows(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :, start:stop]


def _keys(tensor: Tensor | None, columns: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :columns]


def _part_of_mask(mask: Tensor | None, start: int, stop: int, columns: int) -> Tensor | None:
    if mask is not None and mask.size(2) > 1:
        mask = mask[:, :, start:stop]
    if mask is not None and mask.size(3) > 1:
        mask = mask[:, :, :, :columns]
    return mask


@torch.no_grad()
def softmax_strips(scores: Scores) -> Iterator[tuple[Strip, Tensor]]:
    """Each strip with its probabilities, (heads, groups, rows, columns); they are overwritten by the next."""
    work = Workspace(scores, scores.dtype)
    units, row_sinks = work.units, work.units.sinks(scores, scores.dtype)
    for piece in pieces(scores):
        of_piece = list(strips(scores, piece))
        (buffer,) = work.buffers(of_piece, 1)
        query = work.query.view(-1, scores.groups, *work.query.shape[2:])[piece.heads]
        key, mask = work.key[piece.heads], work.of_mask(scores.mask, piece)
        for strip in of_piece:
            start, stop, columns = strip.bounds
            logits = _room_for(buffer, query, stop - start, columns)
            capped(query[:, :, start:stop], key[:, :columns], units.scale, units.softcap, logits)
            part = _part_of_mask(mask, start, stop, columns)
            hide(logits, part, units.hidden, *_hiding(work.triangle, start, stop, columns))
            yield strip, softmax(logits, None if row_sinks is None else strip.of_queries(row_sinks), units)


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request strip by strip; differentiable in query, key, mask, sinks, values and weights."""
    return _strip_pass.evaluate(
        scores,
        request,
        lambda request: _Forward(scores, request).run(),
        lambda ctx, gradients: _Backward(scores, ctx, gradients).run(),
    )


class _Forward:
    """Sums of exponentials, strip by strip; and from them, for all rows at once, what was asked of the matrix."""

    def __init__(self, scores: Scores, request: Request) -> None:
        batch, heads, _, keys = scores.shape
        self.scores, self.request = scores, request
        self.work = work = Workspace(scores, request.dtype)
        self.pieces = pieces(scores)
        self.rows = Rows(scores, request, work.units)
        self.values = None if request.values is None else work.of_keys(request.values)
        self.weights = None if request.weights is None else request.weights.to(request.dtype).contiguous()
        self.transposed = None
        if self.weights is not None:
            self.transposed = work.sums_over_queries(self.pieces, batch * heads, keys, self.weights.shape[-1])
        self.segments = [[[*run.indices(keys)] for run in runs] for runs in request.segments]
        self.blocks = self.block_weights = None
        if request.blocks is not None:
            self.block_weights = request.blocks.weights.to(request.dtype).contiguous()
            self.edges = request.blocks.edges()
            self.blocks = work.sums_over_queries(self.pieces, batch, heads, len(self.edges), keys)
        self.zero, self.ramp = 0, None
        if request.distance is not None:  # from the first key to the farthest query, and back
            self.zero = max(0, scores.shape[2] + request.distance)
            self.ramp = torch.arange(-self.zero, keys + max(0, -request.distance), device=work.query.device)
            self.ramp = self.ramp.abs().to(request.dtype)

    def run(self) -> Answer:
        """Add up every strip, then finish."""
        answer_strips = self.work.compiled(_answer_strips)
        done: list[Piece] = []

        def add(piece: Piece) -> None:
            self._add(piece, answer_strips)
            done.append(piece)
            if self.request.progress is not None:
                self.request.progress(len(done) / len(self.pieces))

        _do(add, self.pieces, together=not _on_gpu(self.scores))
        batch, heads, _, keys = self.scores.shape
        transposed = None if self.transposed is None else total_of_parts(self.transposed).view(batch, heads, keys, -1)
        return self.rows.answer(transposed, self._picture())

    def _picture(self) -> Tensor | None:
        """The sums of rows by block, summed by block of keys too, (B, Hq, blocks, W)."""
        asked = self.request.blocks
        if asked is None or self.blocks is None:
            return None
        sums = total_of_parts(self.blocks) @ asked.columns.to(self.request.dtype)
        numbers = torch.tensor([number for number, *_ in self.edges], device=sums.device)
        return sums.new_zeros(*sums.shape[:2], asked.number, sums.shape[3]).index_copy_(2, numbers, sums)

    def _add(self, piece: Piece, answer_strips: Callable[..., None]) -> None:
        work, units, rows, of_piece = self.work, self.work.units, self.rows, list(strips(self.scores, piece))
        buffer, another = (work.buffers(of_piece, 1 if rows.expected is None else 2) * 2)[:2]
        transposed = None if self.transposed is None else self.transposed[piece.number]
        blocks = None if self.blocks is None else self.blocks[piece.number]
        of_rows = (rows.highest, rows.total, rows.expected, rows.mass, rows.forward, rows.distance)
        answer_strips(
            [strip.bounds for strip in of_piece],
            work.of_queries(work.query, piece),
            work.key[piece.heads],
            work.of_mask(self.scores.mask, piece),
            work.triangle,
            work.of_queries(rows.sinks, piece),
            work.of_key_heads(self.values, piece),
            work.of_queries(self.weights, piece),
            self.segments,
            work.of_queries(self.block_weights, piece),
            [] if self.blocks is None else [_blocks_of(strip, self.edges) for strip in of_piece],
            self.request.distance or 0,
            self.zero,
            self.ramp,
            buffer,
            another,
            units.scale,
            units.softcap,
            units.hidden,
            units.to_log2,
            *(work.of_queries(tensor, piece) for tensor in of_rows),
            work.of_key_heads(transposed, piece),
            work.of_queries(blocks, piece),
        )


def _blocks_of(strip: Strip, edges: list[list[int]]) -> list[list[int]]:
    """The blocks, by their place among all, that hold rows of the strip, with the rows counted from its first."""
    start, stop, _ = strip.bounds
    first = bisect_right(edges, start, key=lambda edge: edge[2])
    last = bisect_left(edges, stop, key=lambda edge: edge[1])
    return [
        [place, max(a, start) - start, min(b, stop) - start]
        for place, (_, a, b) in enumerate(edges[first:last], start=first)
    ]


def _answer_strips(
    strips: list[list[int]],
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    triangle: Tensor | None,
    sinks: Tensor | None,
    values: Tensor | None,
    weights: Tensor | None,
    segments: list[list[list[int]]],
    block_weights: Tensor | None,
    blocks: list[list[list[int]]],
    distance: int,
    zero: int,
    ramp: Tensor | None,
    buffer: Tensor,
    another: Tensor,
    scale: float,
    softcap: float,
    hidden: float,
    to_log2: float,
    highest: Tensor | None,
    total: Tensor,
    expected: Tensor | None,
    mass: Tensor | None,
    forward: Tensor | None,
    distances: Tensor | None,
    transposed: Tensor | None,
    sums_of_blocks: Tensor | None,
) -> None:
    """The answers of all strips of a piece, given the piece's part of every tensor."""
    for number, (start, stop, columns) in enumerate(strips):
        starts, biases = _hiding(triangle, start, stop, columns)
        exps = _room_for(another, query, stop - start, columns)
        answer(
            _room_for(buffer, query, stop - start, columns),
            exps,
            query[:, :, start:stop],
            key[:, :columns],
            _part_of_mask(mask, start, stop, columns),
            _rows(sinks, start, stop),
            _keys(values, columns),
            _rows(weights, start, stop),
            segments,
            scale,
            softcap,
            hidden,
            to_log2,
            starts,
            biases,
            _rows(highest, start, stop),
            total[:, :, start:stop],
            _rows(expected, start, stop),
            _rows(mass, start, stop),
            _rows(forward, start, stop),
            _keys(transposed, columns),
        )
        if distances is not None and ramp is not None:
            add_distances(exps, start + distance, zero, ramp, distances[:, :, start:stop])
        if block_weights is not None and sums_of_blocks is not None:
            of_rows, sums = block_weights[:, :, start:stop], sums_of_blocks[:, :, :, :columns]
            add_blocks(exps, of_rows, total[:, :, start:stop], blocks[number], sums)


class _Backward:
    """Gradients of one pass, summed up strip by strip."""

    def __init__(self, scores: Scores, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        self.scores = scores
        self.work = work = Workspace(scores, ctx.request.dtype)
        self.rows = rows = Gradients(work, ctx, gradients)
        # A mask's gradient is added to head by head, and in order, since it may be one for many heads.
        self.pieces = pieces(scores, head_by_head=rows.d_mask is not None)
        self.d_key, self.d_values = (
            None if tensor is None else work.sums_over_queries(self.pieces, *tensor.flatten(0, 1).shape)
            for tensor in (rows.wanted_key, rows.wanted_values)
        )

    def run(self) -> list[Tensor | None]:
        """Add up every strip; gradients of query, key, mask, sinks, values and weights."""
        add_strips = self.work.compiled(_add_strips)
        together = self.rows.d_mask is None and not _on_gpu(self.scores)
        _do(lambda piece: self._add(piece, add_strips), self.pieces, together)
        return self.rows.finish(
            *(None if parts is None else total_of_parts(parts) for parts in (self.d_key, self.d_values))
        )

    def _add(self, piece: Piece, add_strips: Callable[..., None]) -> None:
        work, units, rows, of_piece = self.work, self.work.units, self.rows, list(strips(self.scores, piece))
        (buffer,) = work.buffers(of_piece, 1)
        d_key, d_values = (None if parts is None else parts[piece.number] for parts in (self.d_key, self.d_values))
        add_strips(
            [strip.bounds for strip in of_piece],
            buffer,
            work.of_queries(work.query, piece),
            work.key[piece.heads],
            work.of_mask(self.scores.mask, piece),
            work.triangle,
            work.of_key_heads(rows.values, piece),
            work.of_queries(rows.weights, piece),
            work.of_queries(rows.logsumexp, piece),
            units.scale,
            units.softcap,
            units.hidden,
            units.to_log2,
            work.of_queries(rows.d_logsumexp, piece),
            work.of_queries(rows.d_forward, piece),
            work.of_key_heads(rows.d_transposed, piece),
            work.of_queries(rows.d_entropy, piece),
            work.of_queries(rows.d_query, piece),
            work.of_key_heads(d_key, piece),
            work.of_mask(rows.d_mask, piece),
            work.of_key_heads(d_values, piece),
            work.of_queries(rows.d_weights, piece),
            work.of_queries(rows.row_sums, piece),
        )


def _add_strips(
    strips: list[list[int]],
    buffer: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    triangle: Tensor | None,
    values: Tensor | None,
    weights: Tensor | None,
    logsumexp: Tensor,
    scale: float,
    softcap: float,
    hidden: float,
    to_log2: float,
    d_logsumexp: Tensor | None,
    d_forward: Tensor | None,
    d_transposed: Tensor | None,
    d_entropy: Tensor | None,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_mask: Tensor | None,
    d_values: Tensor | None,
    d_weights: Tensor | None,
    row_sums: Tensor | None,
) -> None:
    """The gradients of all strips of a piece, given the piece's part of every tensor."""
    for start, stop, columns in strips:
        starts, biases = _hiding(triangle, start, stop, columns)
        backward(
            _room_for(buffer, query, stop - start, columns),
            query[:, :, start:stop],
            key[:, :columns],
            _part_of_mask(mask, start, stop, columns),
            _keys(values, columns),
            _rows(weights, start, stop),
            logsumexp[:, :, start:stop],
            scale,
            softcap,
            hidden,
            to_log2,
            starts,
            biases,
            _rows(d_logsumexp, start, stop),
            _rows(d_forward, start, stop),
            _keys(d_transposed, columns),
            _rows(d_entropy, start, stop),
            _rows(d_query, start, stop),
            _keys(d_key, columns),
            _part_of_mask(d_mask, start, stop, columns),
            _keys(d_values, columns),
            _rows(d_weights, start, stop),
            _rows(row_sums, start, stop),
        )
