"""The portable kernel: strips of complete rows, one after another, in a buffer that stays in a core's cache.

A strip holds a few query rows over all the keys they may see, so its softmax is exact in one pass and everything asked
of the matrix — products from either side, entropy — is read from it before the next strip overwrites it. Memory is
O(M · strip), whatever N is. It beats the online form, which must rescale its sums and needs a second pass for columns.

Batch and key heads are one dimension here: tensors of queries are (heads, groups, N, …), where groups are the query heads
that share a key head, those of keys (heads, M, …), and a strip is (heads, groups, rows, columns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.maps import _workers
from regard.maps._request import (
    Answer,
    Request,
    received_as_weights,
    received_from_weights,
    segments_as_values,
    segments_from_values,
)
from regard.maps._scores import Scores

# Numbers in one strip: of lower ones a CPU's products are slower than they gain by the cache; or they keep a GPU busy.
_STRIP = {"cpu": 2**19, "cuda": 2**26}
# Rows of all groups in a strip: with fewer a product is slow, with more a triangle's upper half is wasted on.
_ROWS_AT_LEAST, _ROWS_AT_MOST = 64, 128
# Pieces that workers take one after another: as many as leave no core idle for long at the end.
_PIECES = 16
# Up to this magnitude of the logits their exponentials need no shift by the row's maximum: far from float32's ends.
_UNSHIFTED = 20.0
# Hides a logit, and times a probability of 0 gives 0, which −inf would not.
_HIDDEN = -1e30
_LOG_2 = math.log(2)


@dataclass(frozen=True)
class Strip:
    """Some rows of some heads: slices of (batch · key heads) and of the queries, and the number of keys in reach."""

    heads: slice
    rows: slice
    columns: int
    groups: int

    @property
    def query_heads(self) -> slice:
        return slice(self.heads.start * self.groups, self.heads.stop * self.groups)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.heads.stop - self.heads.start, self.groups, self.rows.stop - self.rows.start, self.columns

    def of_queries(self, tensor: Tensor) -> Tensor:
        """This strip's part, (heads, groups, rows, …), of a contiguous (B, Hq, N, …) tensor."""
        return tensor.view(-1, self.groups, *tensor.shape[2:])[self.heads, :, self.rows]

    def of_keys(self, tensor: Tensor, per_query_head: bool = False) -> Tensor:
        """This strip's part of a (batch · key heads, M, …) tensor, or of a (batch · query heads, M, …) one."""
        return tensor[self.query_heads if per_query_head else self.heads, : self.columns]


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


def product(matrix: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A strip (heads, groups, rows, columns) times (heads, columns, W), or times (heads · groups, columns, W)."""
    heads, groups, rows, columns = matrix.shape
    left = matrix.reshape(len(right), -1, columns)
    if out is not None and out.is_contiguous():
        torch.bmm(left, right, out=out.view(len(right), -1, right.shape[-1]))
        return out
    result = torch.bmm(left, right).view(heads, groups, rows, right.shape[-1])
    return result if out is None else out.copy_(result)


def total_of_parts(parts: Tensor) -> Tensor:
    """The sum over the parts of all queries, in a fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def add_transposed_product(total: Tensor, matrix: Tensor, right: Tensor) -> None:
    """Add the transposed strip times (heads, groups, rows, W) to (heads, columns, W), or (heads · groups, columns, W)."""
    left = matrix.reshape(len(total), -1, matrix.shape[-1])
    right = right.reshape(len(total), left.shape[1], -1)
    total.transpose(-1, -2).baddbmm_(right.transpose(-1, -2), left)


class Workspace:
    """One call's tensors in the form in which strips read them.

    2ˣ is evaluated in half the time of eˣ and does not slow down where it underflows, so logits are in units of ``unit``
    nats. With an additive mask they are in nats until they are shifted, since its extremes (the least number of its dtype,
    by custom) would overflow.
    """

    def __init__(self, scores: Scores, dtype: torch.dtype) -> None:
        self.scores = scores
        self.dtype = dtype
        self.query = scores.query.to(dtype).contiguous()
        self.key = self.of_keys(scores.key)
        self.biased = scores.mask is not None and scores.mask.is_floating_point()
        self.shifted = self.biased or scores.limit > _UNSHIFTED
        self.unit = 1.0 if self.biased else _LOG_2
        self.sinks = None if scores.sinks is None else self.of_sinks(scores.sinks)
        # Below the extremes of an additive mask too.
        hidden = -math.inf if self.biased else _HIDDEN
        self._triangle = _triangle(hidden, dtype, self.query.device) if scores.is_causal else None

    def of_keys(self, tensor: Tensor) -> Tensor:
        """(B, heads, M, …) as (B · heads, M, …)."""
        return tensor.to(self.dtype).flatten(0, 1).contiguous()

    def of_sinks(self, sinks: Tensor) -> Tensor:
        """One logit for each row, (B, Hq, N), in units of ``unit``."""
        return (sinks.to(self.dtype) / self.unit).expand(self.scores.shape[:3]).contiguous()

    def of_mask(self, mask: Tensor, strip: Strip) -> Tensor:
        """The strip's part, of sizes that may be 1, of a mask or of its gradient: a view if the strip is of one head."""
        rows = strip.rows if mask.shape[2] > 1 else slice(None)
        columns = slice(strip.columns) if mask.shape[3] > 1 else slice(None)
        mask = mask[:, :, rows, columns].unflatten(1, (-1, strip.groups) if mask.shape[1] > 1 else (1, 1))
        if mask.shape[0] == mask.shape[1] == 1:
            return mask[0]
        key_heads = self.scores.key.shape[1]
        if strip.heads.stop - strip.heads.start == 1:
            batch, head = divmod(strip.heads.start, key_heads)
            return mask[batch % mask.shape[0], head % mask.shape[1]].unsqueeze(0)
        heads = torch.arange(strip.heads.start, strip.heads.stop, device=mask.device)
        return mask[heads // key_heads % mask.shape[0], heads % key_heads % mask.shape[1]]

    def buffer(self, strips: list[Strip]) -> Tensor:
        """Uninitialised room for any of these strips."""
        return self.query.new_empty(max(math.prod(strip.shape) for strip in strips))

    def logits(self, strip: Strip, buffer: Tensor) -> Tensor:
        """The strip's logits in the buffer; what is hidden is far below any other."""
        return self.mask(strip, self.capped(strip, buffer))

    def capped(self, strip: Strip, buffer: Tensor) -> Tensor:
        """The strip's logits before the mask."""
        scores = self.scores
        out = buffer[: math.prod(strip.shape)].view(strip.shape)
        flat, query = out.flatten(1, 2), strip.of_queries(self.query).flatten(1, 2)
        scale = scores.scale / (scores.softcap or self.unit)
        torch.baddbmm(flat, query, strip.of_keys(self.key).transpose(-1, -2), beta=0, alpha=scale, out=flat)
        return out if scores.softcap is None else out.tanh_().mul_(scores.softcap / self.unit)

    def mask(self, strip: Strip, logits: Tensor) -> Tensor:
        """The logits, of which those that the mask or the triangle hides are now far below any other."""
        if self.scores.mask is not None:
            part = self.of_mask(self.scores.mask, strip)
            # Not masked_fill_, which takes longer than all the rest of a strip.
            logits.add_(part) if self.biased else logits.add_((~part).to(self.dtype), alpha=_HIDDEN)
        if self._triangle is not None and strip.columns > strip.rows.start:
            _, _, rows, columns = strip.shape
            logits[..., strip.rows.start :] += self._triangle[:rows, : columns - strip.rows.start]
        return logits

    def shift(self, logits: Tensor, sinks: Tensor | None) -> Tensor:
        """The highest logit of each row, (heads, groups, rows), which is taken from the logits, now in units of log 2."""
        highest = logits.amax(dim=-1)
        if sinks is not None:
            highest = torch.maximum(highest, sinks)
        if self.scores.mask is not None:  # a row that sees nothing: 2^(−inf − 0) = 0 throughout
            highest.masked_fill_(highest <= (-math.inf if self.biased else _HIDDEN / 2), 0.0)
        logits.sub_(highest.unsqueeze(-1))
        if self.biased:
            logits.mul_(1 / _LOG_2)
        return highest

    def probabilities(self, logits: Tensor, logsumexp: Tensor) -> Tensor:
        """P in place of a strip's logits, from log-sum-exps already known (+inf for rows that see nothing)."""
        logits.sub_(logsumexp.unsqueeze(-1) / self.unit)
        return (logits.mul_(1 / _LOG_2) if self.biased else logits).exp2_()

    def exp_sinks(self, sinks: Tensor, highest: Tensor | None) -> Tensor:
        """What a row's sink adds to its sum of exponentials."""
        return ((sinks if highest is None else sinks - highest) * (self.unit / _LOG_2)).exp2_()

    def sums_over_queries(self, of_all: list[Piece], *shape: int) -> Tensor:
        """Zeros for each part of the queries, since several workers add to them at once."""
        return self.query.new_zeros(1 + max(piece.number for piece in of_all), *shape)


@lru_cache(maxsize=8)
def _triangle(hidden: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides the part of a causal strip's last columns that lies above the diagonal."""
    return torch.full((_ROWS_AT_MOST, _ROWS_AT_MOST), hidden, dtype=dtype, device=device).triu_(1)


@torch.no_grad()
def softmax_strips(scores: Scores) -> Iterator[tuple[Strip, Tensor]]:
    """Each strip with its probabilities, (heads, groups, rows, columns); they are overwritten by the next."""
    work = Workspace(scores, scores.dtype)
    for piece in pieces(scores):
        of_piece = list(strips(scores, piece))
        buffer = work.buffer(of_piece)
        for strip in of_piece:
            logits = work.logits(strip, buffer)
            sinks = None if work.sinks is None else strip.of_queries(work.sinks)
            highest = work.shift(logits, sinks)
            total = logits.exp2_().sum(dim=-1)
            if sinks is not None:
                total += work.exp_sinks(sinks, highest)
            yield strip, logits.div_(total.masked_fill_(total == 0, 1.0).unsqueeze(-1))


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request strip by strip; differentiable in query, key, mask, sinks, values and weights."""
    request = received_as_weights(request)
    if scores.requires_grad or request.requires_grad:
        asked, request = request, segments_as_values(scores, request)
        tensors = (scores.query, scores.key, scores.mask, scores.sinks, request.values, request.weights)
        apply: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = _Differentiable.apply
        logsumexp, forward, transposed, entropy = apply(scores, request, *tensors)
        answer = segments_from_values(asked, Answer(logsumexp, forward, transposed, entropy=entropy))
    else:
        answer = _Forward(scores, request).run()
    return received_from_weights(request, answer)


class _Forward:
    """Sums of exponentials, strip by strip; and from them, for all rows at once, what was asked of the matrix."""

    def __init__(self, scores: Scores, request: Request) -> None:
        batch, heads, queries, keys = scores.shape
        self.scores, self.request = scores, request
        self.work = work = Workspace(scores, request.dtype)
        self.pieces = pieces(scores)
        new = work.query.new_empty
        self.highest = new(batch, heads, queries) if work.shifted else None
        self.total = new(batch, heads, queries)
        self.weighted = new(batch, heads, queries) if request.entropy else None
        self.mass = new(batch, heads, queries, len(request.segments)) if request.segments else None
        self.values = None if request.values is None else work.of_keys(request.values)
        self.forward = None if request.values is None else new(batch, heads, queries, request.values.shape[-1])
        self.per_query_head = request.values is not None and request.values.shape[1] != scores.key.shape[1]
        self.weights = None if request.weights is None else request.weights.to(request.dtype).contiguous()
        self.transposed = None
        if self.weights is not None:
            self.transposed = work.sums_over_queries(self.pieces, batch * heads, self.weights.shape[-1], keys)

    @torch.no_grad()
    def run(self) -> Answer:
        """Add up every strip, then finish."""
        _do(self._add_piece, self.pieces, together=not _on_gpu(self.scores))
        batch, heads, _, keys = self.scores.shape
        total = self.total if self.scores.mask is None else self.total.masked_fill(self.total == 0, 1.0)
        logsumexp = self.total.log()
        entropy = None if self.weighted is None else self._entropy(self.weighted.div_(total), logsumexp, total)
        if self.highest is not None:
            logsumexp.add_(self.highest, alpha=self.work.unit)
        transposed = None
        if self.transposed is not None:
            transposed = total_of_parts(self.transposed).view(batch, heads, -1, keys).transpose(-1, -2)
        if self.forward is not None:
            self.forward.div_(total.unsqueeze(-1))
        if self.mass is not None:
            self.mass.div_(total.unsqueeze(-1))
        return Answer(logsumexp, self.forward, transposed, entropy=entropy, mass=self.mass)

    def _entropy(self, expected: Tensor, logsum: Tensor, total: Tensor) -> Tensor:
        """``Σ P (log Σ e^s − s)`` over the keys, beside which a sink has its share of Σ e^s; ``expected`` is ``Σ P s``."""
        if self.work.sinks is not None:
            logsum = logsum * (1 - self.work.exp_sinks(self.work.sinks, self.highest) / total)
        return torch.sub(logsum, expected, alpha=_LOG_2).clamp_(min=0)

    def _add_piece(self, piece: Piece) -> None:
        of_piece = list(strips(self.scores, piece))
        buffer = self.work.buffer(of_piece)
        another = self.work.buffer(of_piece) if self.request.entropy else buffer
        for strip in of_piece:
            self._add(strip, piece.number, buffer, another)

    def _add(self, strip: Strip, part: int, buffer: Tensor, another: Tensor) -> None:
        work = self.work
        logits = work.logits(strip, buffer)
        sinks = None if work.sinks is None else strip.of_queries(work.sinks)
        highest = None
        if self.highest is not None:
            highest = strip.of_queries(self.highest).copy_(work.shift(logits, sinks))
        exps = torch.exp2(logits, out=another[: logits.numel()].view(strip.shape))
        total = torch.sum(exps, dim=-1, out=strip.of_queries(self.total))
        if sinks is not None:
            total += work.exp_sinks(sinks, highest)
        if self.weighted is not None:
            if work.biased:  # a hidden key's −inf · 0 counts as nothing
                logits.clamp_(min=torch.finfo(logits.dtype).min)
            torch.sum(logits.mul_(exps), dim=-1, out=strip.of_queries(self.weighted))
        if self.mass is not None:
            masses = strip.of_queries(self.mass)
            for number, runs in enumerate(self.request.segments):
                if not runs:  # a segment of no keys
                    masses[..., number] = 0
                    continue
                torch.sum(exps[..., runs[0]], dim=-1, out=masses[..., number])
                for run in runs[1:]:
                    masses[..., number] += exps[..., run].sum(dim=-1)
        if self.forward is not None and self.values is not None:
            product(exps, strip.of_keys(self.values, self.per_query_head), strip.of_queries(self.forward))
        if self.transposed is not None and self.weights is not None:
            if self.scores.mask is not None:
                total = total.masked_fill(total == 0, 1.0)
            sums = self.transposed[part, strip.query_heads, :, : strip.columns].transpose(-1, -2)
            add_transposed_product(sums, exps, strip.of_queries(self.weights) / total.unsqueeze(-1))


class _Differentiable(torch.autograd.Function):
    """The forward pass, and a backward pass that evaluates each strip again instead of having stored it."""

    @staticmethod
    def forward(ctx: Any, scores: Scores, request: Request, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        answer = _Forward(scores, request).run()
        ctx.scores, ctx.request = scores, request
        ctx.save_for_backward(*tensors, answer.logsumexp)
        return answer.logsumexp, answer.forward, answer.transposed, answer.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.scores.query.device.type, enabled=False):
            return None, None, *_Backward(ctx, gradients).run()


class _Backward:
    """Gradients of one pass, summed up strip by strip.

    With ``dP = dO Vᵀ + W dTᵀ − dH (log P + 1)`` the logits' gradient is ``P ⊙ (dP − rowsum(P ⊙ dP) + dL)``. A sink has no
    dP, but its share of the rest; a cap c takes ``1 − (s/c)²`` of the gradient on its way to queries and keys.
    """

    def __init__(self, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        query, key, mask, sinks, values, weights, logsumexp = ctx.saved_tensors
        self.scores: Scores = ctx.scores
        self.work = work = Workspace(self.scores, ctx.request.dtype)
        self.inputs = (query, key, mask, sinks, values, weights)
        self.needs = ctx.needs_input_grad[2:]
        self.per_query_head = values is not None and values.shape[1] != key.shape[1]
        self.values = None if values is None else work.of_keys(values)
        self.weights = None if weights is None else weights.to(work.dtype).contiguous()
        self.logsumexp = logsumexp.masked_fill(logsumexp.isneginf(), math.inf)
        d_logsumexp, d_forward, d_transposed, d_entropy = gradients
        self.d_logsumexp = None if d_logsumexp is None else d_logsumexp.contiguous()
        self.d_forward = None if d_forward is None else d_forward.contiguous()
        self.d_transposed = None if d_transposed is None else work.of_keys(d_transposed)
        self.d_entropy = None if d_entropy is None else d_entropy.contiguous()
        self._make_sums()

    def _make_sums(self) -> None:
        query, key, mask, sinks, values, weights = (
            tensor if need else None for tensor, need in zip(self.inputs, self.needs, strict=True)
        )
        new = self.work.query.new_zeros
        batch, heads, queries, _ = self.scores.shape
        # A mask's gradient is added to head by head, and in order, since it may be one for many heads.
        self.pieces = pieces(self.scores, head_by_head=mask is not None)
        self.d_query = None if query is None else new(query.shape)
        self.d_key = None
        if key is not None:
            self.d_key = self.work.sums_over_queries(self.pieces, batch * key.shape[1], *key.shape[2:])
        self.d_mask = None if mask is None else new(mask.shape)
        self.row_sums = None if sinks is None else new(batch, heads, queries)
        self.d_values = None
        if values is not None and self.d_forward is not None:
            self.d_values = self.work.sums_over_queries(self.pieces, batch * values.shape[1], *values.shape[2:])
        self.d_weights = None if weights is None or self.d_transposed is None else new(weights.shape)

    def run(self) -> list[Tensor | None]:
        """Add up every strip; gradients of query, key, mask, sinks, values and weights."""
        _do(self._add_piece, self.pieces, together=self.d_mask is None and not _on_gpu(self.scores))
        d_key = None if self.d_key is None else total_of_parts(self.d_key)
        d_values = None if self.d_values is None else total_of_parts(self.d_values)
        sums = (self.d_query, d_key, self.d_mask, self._d_sinks(), d_values, self.d_weights)
        return [
            None if total is None or tensor is None else total.view(tensor.shape).to(tensor.dtype)
            for total, tensor in zip(sums, self.inputs, strict=True)
        ]

    def _d_sinks(self) -> Tensor | None:
        sinks = self.inputs[3]
        if self.row_sums is None or sinks is None:
            return None
        gradient = -self.row_sums if self.d_logsumexp is None else self.d_logsumexp - self.row_sums
        return (torch.exp(sinks - self.logsumexp) * gradient).sum_to_size(sinks.shape)

    def _add_piece(self, piece: Piece) -> None:
        of_piece = list(strips(self.scores, piece))
        buffer = self.work.buffer(of_piece)
        for strip in of_piece:
            self._add(strip, piece.number, buffer)

    def _add(self, strip: Strip, part: int, buffer: Tensor) -> None:
        work, scores = self.work, self.scores
        logits = work.capped(strip, buffer)
        slope = None if scores.softcap is None else 1 - (logits * (work.unit / scores.softcap)).square_()
        matrix = work.probabilities(work.mask(strip, logits), strip.of_queries(self.logsumexp))
        if self.d_values is not None and self.d_forward is not None:
            total = strip.of_keys(self.d_values[part], self.per_query_head)
            add_transposed_product(total, matrix, strip.of_queries(self.d_forward))
        if self.d_weights is not None and self.d_transposed is not None:
            product(matrix, strip.of_keys(self.d_transposed, per_query_head=True), strip.of_queries(self.d_weights))
        if any(total is not None for total in (self.d_query, self.d_key, self.d_mask, self.row_sums)):
            self._add_logit_gradient(strip, part, self._logit_gradient(strip, matrix), slope)

    def _add_logit_gradient(self, strip: Strip, part: int, d_logits: Tensor, slope: Tensor | None) -> None:
        if self.d_mask is not None:
            total = self.work.of_mask(self.d_mask, strip)
            total += d_logits.sum_to_size(total.shape)
        d_logits.mul_(self.scores.scale)
        if slope is not None:
            d_logits.mul_(slope)
        if self.d_query is not None:
            product(d_logits, strip.of_keys(self.work.key), strip.of_queries(self.d_query))
        if self.d_key is not None:
            total = strip.of_keys(self.d_key[part])
            add_transposed_product(total, d_logits, strip.of_queries(self.work.query))

    def _logit_gradient(self, strip: Strip, matrix: Tensor) -> Tensor:
        d_matrix = torch.zeros_like(matrix)
        if self.values is not None and self.d_forward is not None:
            values = strip.of_keys(self.values, self.per_query_head)
            d_matrix += product(strip.of_queries(self.d_forward), values.transpose(-1, -2))
        if self.weights is not None and self.d_transposed is not None:
            d_transposed = strip.of_keys(self.d_transposed, per_query_head=True)
            d_matrix += product(strip.of_queries(self.weights), d_transposed.transpose(-1, -2))
        if self.d_entropy is not None:
            logarithm = matrix.log().clamp_(min=torch.finfo(matrix.dtype).min)
            d_matrix -= logarithm.add_(1).mul_(strip.of_queries(self.d_entropy).unsqueeze(-1))
        row_sums = torch.linalg.vecdot(matrix, d_matrix)
        if self.row_sums is not None:
            strip.of_queries(self.row_sums).copy_(row_sums)
        if self.d_logsumexp is not None:
            row_sums = row_sums - strip.of_queries(self.d_logsumexp)
        return d_matrix.sub_(row_sums.unsqueeze(-1)).mul_(matrix)
