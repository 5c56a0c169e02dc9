"""The kernel of masks that are rules: it visits the tiles in which a pair is visible, and no others.

A strip holds some query rows over the runs of keys that they see, side by side, so that its softmax is exact in one pass and
everything asked of the matrix is read from it. Full runs need no mask; in partial ones the rule is evaluated. Time grows
with the number of tiles that are visible, memory with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.maps import _strip_pass, _workers
from regard.maps._plan import Plan, Share, Strip, plan_of
from regard.maps._request import Answer, Request
from regard.maps._scores import Scores
from regard.maps._strip import answer, backward, capped, hide
from regard.maps._strip_pass import Gradients, Rows, Units, softmax
from regard.masks import window


class Workspace(_strip_pass.Workspace):
    """One call's tensors, of which strips take parts, and the plan of the strips."""

    def __init__(self, scores: Scores, plan: Plan) -> None:
        super().__init__(scores, plan.dtype)
        self.plan = plan

    def buffer(self, strip: Strip, number: int = 0) -> Tensor:
        """Uninitialised room for one strip; each thread has its own, the same each time."""
        kept: list[Tensor] = self.of_thread.__dict__.setdefault("buffers", [])
        size = math.prod(strip.shape)
        while len(kept) <= number:
            kept.append(self.query.new_empty(size))
        if kept[number].numel() < size:
            kept[number] = self.query.new_empty(size)
        return kept[number][:size].view(strip.shape)

    def hiding(self, strip: Strip) -> tuple[Tensor | None, list[int], list[Tensor]]:
        """The strip's part of the mask, and biases with the columns where they begin."""
        mask = None if self.scores.mask is None else strip.of_mask(self.scores.mask)
        found = list(self.plan.biases(strip))
        return mask, [columns.start for columns, _ in found], [bias for _, bias in found]

    def shares(self) -> list[Share]:
        return self.plan.shares(torch.get_num_threads() if self.query.device.type == "cpu" else 1)


class KeySums:
    """Sums over queries, (B · heads, M, W), to which several workers add.

    Shares that do not have their heads to themselves add into tensors of their own, which are added up at the end, in the
    order of the shares: the result does not depend on who was faster.
    """

    def __init__(self, total: Tensor, shares: list[Share], per_query_head: bool) -> None:
        self.total, self.per_query_head = total, per_query_head
        self._parts = {share: self._of(share) if share.alone else None for share in shares}

    def room(self, share: Share, strip: Strip) -> Tensor:
        """What to add a strip's product to, (heads, columns, W): the sums themselves, where its keys are one slice."""
        part = self._part(share, strip)
        if len(strip.spans) == 1:
            return part[:, self._in(share, strip.spans[0])]
        return part.new_zeros(len(part), strip.columns, part.shape[-1])

    def settle(self, share: Share, strip: Strip, room: Tensor) -> None:
        """Bring what was added to its place, if it is not there."""
        if len(strip.spans) > 1:
            part = self._part(share, strip)
            for keys, columns in strip.pieces():
                part[:, self._in(share, keys)].add_(room[:, columns])

    def finish(self) -> Tensor:
        """The sums, once every share has added its own."""
        for share, part in self._parts.items():
            if part is not None and not share.alone:
                self._of(share).add_(part)
        return self.total

    def _part(self, share: Share, strip: Strip) -> Tensor:
        part = self._parts[share]
        if part is None:
            part = self._parts[share] = torch.zeros_like(self._of(share))
        if self.per_query_head:
            start = strip.query_heads.start - share.query_heads.start
            part = part[start : start + strip.query_heads.stop - strip.query_heads.start]
        return part

    def _of(self, share: Share) -> Tensor:
        return self.total[share.query_heads if self.per_query_head else share.heads, share.keys]

    @staticmethod
    def _in(share: Share, keys: slice) -> slice:
        return slice(keys.start - share.keys.start, keys.stop - share.keys.start)


def _of_queries(strip: Strip, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else strip.of_queries(tensor)


class _Forward:
    """The answer, strip by strip."""

    def __init__(self, scores: Scores, request: Request, plan: Plan) -> None:
        batch, heads, _, keys = scores.shape
        self.work = work = Workspace(scores, plan)
        self.segments = request.segments
        self.rows = Rows(scores, request, work.units)
        self.shares = work.shares()
        self.values = None if request.values is None else work.of_keys(request.values)
        self.values_per_query_head = request.values is not None and request.values.shape[1] != scores.key.shape[1]
        self.weights = None if request.weights is None else request.weights.to(plan.dtype).contiguous()
        self.transposed = None
        if self.weights is not None:
            sums = work.query.new_zeros(batch * heads, keys, self.weights.shape[-1])
            self.transposed = KeySums(sums, self.shares, per_query_head=True)

    def answer(self) -> Answer:
        """Visit every strip and gather what they gave."""
        self.answer_strip = self.work.compiled(answer)
        _workers.each(self._visit, self.shares)
        transposed = self.transposed
        return self.rows.answer(
            None if transposed is None else transposed.finish().unflatten(0, self.rows.total.shape[:2])
        )

    def _visit(self, share: Share) -> None:
        work, units, rows = self.work, self.work.units, self.rows
        for strip in share.strips:
            mask, starts, biases = work.hiding(strip)
            transposed = None if self.transposed is None else self.transposed.room(share, strip)
            of_rows = (rows.highest, rows.total, rows.expected, rows.mass, rows.forward)
            self.answer_strip(
                work.buffer(strip),
                work.buffer(strip, 0 if rows.expected is None else 1),
                strip.of_queries(work.query),
                strip.of_keys(work.key),
                mask,
                _of_queries(strip, rows.sinks),
                None if self.values is None else strip.of_keys(self.values, self.values_per_query_head),
                _of_queries(strip, self.weights),
                [list(_runs_of_segment(strip, runs)) for runs in self.segments],
                units.scale,
                units.softcap,
                units.hidden,
                units.to_log2,
                starts,
                biases,
                *(_of_queries(strip, tensor) for tensor in of_rows),
                transposed,
            )
            if self.transposed is not None and transposed is not None:
                self.transposed.settle(share, strip, transposed)


def _runs_of_segment(strip: Strip, runs: tuple[slice, ...]) -> Iterator[list[int]]:
    """The strip's columns, as (start, stop, step), that hold a segment's runs of keys."""
    for keys, columns in strip.pieces():
        for run in runs:
            step = run.step or 1
            start, stop = max(run.start, keys.start), min(run.stop, keys.stop)
            start += (run.start - start) % step
            if start < stop:
                before = columns.start - keys.start
                yield [start + before, stop + before, step]


class _Backward:
    """Gradients of one pass, summed up strip by strip."""

    def __init__(self, scores: Scores, plan: Plan, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        self.work = work = Workspace(scores, plan)
        self.rows = rows = Gradients(work, ctx, gradients)
        self.shares = work.shares()
        self.d_key = self._key_sums(rows.wanted_key, per_query_head=False)
        self.d_values = self._key_sums(rows.wanted_values, rows.values_per_query_head)

    def _key_sums(self, tensor: Tensor | None, per_query_head: bool) -> KeySums | None:
        if tensor is None:
            return None
        return KeySums(self.work.query.new_zeros(tensor.flatten(0, 1).shape), self.shares, per_query_head)

    def gradients(self) -> list[Tensor | None]:
        """Of query, key, mask, sinks, values and weights."""
        self.backward = self.work.compiled(backward)
        if self.rows.d_mask is not None:  # its dimensions of size 1 are written to by every share
            for share in self.shares:
                self._visit(share)
        else:
            _workers.each(self._visit, self.shares)
        return self.rows.finish(*(None if sums is None else sums.finish() for sums in (self.d_key, self.d_values)))

    def _visit(self, share: Share) -> None:
        work, units, rows = self.work, self.work.units, self.rows
        for strip in share.strips:
            mask, starts, biases = work.hiding(strip)
            d_key, d_values = (
                None if sums is None else sums.room(share, strip) for sums in (self.d_key, self.d_values)
            )
            d_mask = None if rows.d_mask is None else torch.zeros_like(work.buffer(strip))
            self.backward(
                work.buffer(strip),
                strip.of_queries(work.query),
                strip.of_keys(work.key),
                mask,
                None if rows.values is None else strip.of_keys(rows.values, rows.values_per_query_head),
                _of_queries(strip, rows.weights),
                strip.of_queries(rows.logsumexp),
                units.scale,
                units.softcap,
                units.hidden,
                units.to_log2,
                starts,
                biases,
                _of_queries(strip, rows.d_logsumexp),
                _of_queries(strip, rows.d_forward),
                None if rows.d_transposed is None else strip.of_keys(rows.d_transposed, per_query_head=True),
                _of_queries(strip, rows.d_entropy),
                _of_queries(strip, rows.d_query),
                d_key,
                d_mask,
                d_values,
                _of_queries(strip, rows.d_weights),
                _of_queries(strip, rows.row_sums),
            )
            for sums, room in ((self.d_key, d_key), (self.d_values, d_values)):
                if sums is not None and room is not None:
                    sums.settle(share, strip, room)
            if rows.d_mask is not None and d_mask is not None:
                self._add_to_mask(rows.d_mask, strip, d_mask)

    @staticmethod
    def _add_to_mask(total: Tensor, strip: Strip, d_logits: Tensor) -> None:
        batch, heads = strip.batch, strip.heads_of_batch
        d_logits = d_logits.view(batch.stop - batch.start, heads.stop - heads.start, *d_logits.shape[2:])
        for keys, columns in strip.pieces():
            parts = (batch, heads, strip.rows, keys)
            chosen = (slice(None) if size == 1 else part for size, part in zip(total.shape, parts, strict=True))
            part = total[tuple(chosen)]
            part += d_logits[..., columns].sum_to_size(part.shape)


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request from the visible tiles; differentiable in query, key, an additive mask, values and weights."""
    # The log-sum-exp of a half-precision row would not be good enough to make its probabilities again.
    request = replace(request, dtype=torch.promote_types(request.dtype, torch.float32))
    plan = _plan(scores, request.dtype)
    return _strip_pass.evaluate(
        scores,
        request,
        lambda asked: _Forward(scores, asked, plan).answer(),
        lambda ctx, gradients: _Backward(scores, plan, ctx, gradients).gradients(),
    )


def _plan(scores: Scores, dtype: torch.dtype) -> Plan:
    rule = window(None, None) if scores.rule is None else scores.rule
    return plan_of(scores, rule, Units.of(scores).hidden, dtype)


@torch.no_grad()
def softmax_strips(scores: Scores) -> Iterator[tuple[Strip, Tensor]]:
    """Each strip with its probabilities, (heads, groups, rows, columns); they are overwritten by the next."""
    work = Workspace(scores, _plan(scores, scores.dtype))
    units, row_sinks = work.units, work.units.sinks(scores, scores.dtype)
    for strip in work.plan.strips():
        mask, starts, biases = work.hiding(strip)
        query, key = strip.of_queries(work.query), strip.of_keys(work.key)
        logits = capped(query, key, units.scale, units.softcap, work.buffer(strip))
        yield strip, softmax(hide(logits, mask, units.hidden, starts, biases), _of_queries(strip, row_sinks), units)


@torch.no_grad()
def viewers(scores: Scores, weights: Tensor) -> Tensor:
    """The sum of the weights (B|1, 1, N) of the queries that may see each key: (B, Hq, M)."""
    plan, (batch, heads, queries, keys) = _plan(scores, scores.dtype), scores.shape
    weights = weights.expand(batch, heads, queries).contiguous()
    sums = weights.new_zeros(batch * heads, keys)
    for strip in plan.strips():
        visible = weights.new_ones(strip.shape)
        for columns, bias in plan.biases(strip):
            visible[..., columns] *= bias == 0
        if scores.mask is not None:
            visible.masked_fill_(~strip.of_mask(scores.visible()), 0)
        part = (strip.of_queries(weights).unsqueeze(-2) @ visible).squeeze(-2).flatten(0, 1)
        for span, columns in strip.pieces():
            sums[strip.query_heads, span] += part[..., columns]
    return sums.view(batch, heads, keys)
