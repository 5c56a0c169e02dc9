"""The kernel of masks that are rules: it visits the tiles in which a pair is visible, and no others.

A strip holds some query rows over the runs of keys that they see, side by side, so that its softmax is exact in one pass and
everything asked of the matrix is read from it. Full runs need no mask; in partial ones the rule is evaluated. Time grows
with the number of tiles that are visible, memory with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.maps import _workers
from regard.maps._plan import Plan, Share, Strip
from regard.maps._request import (
    Answer,
    Request,
    received_as_weights,
    received_from_weights,
    segments_as_values,
    segments_from_values,
)
from regard.maps._scores import Scores
from regard.masks import Mask, window


class Workspace:
    """One worker's buffers, into which strips are written one after another."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, strip: Strip) -> Tensor:
        """Uninitialised room for one strip; the same memory each time."""
        size = math.prod(strip.shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.call.query.new_empty(size)
        return self._buffers[name][:size].view(strip.shape)

    def logits(self, strip: Strip, key: Tensor) -> Tensor:
        """The strip's masked logits, in the buffer."""
        out = product(strip.of_queries(self.call.query), key.transpose(-1, -2), self.buffer("logits", strip))
        attn_mask = self.call.scores.mask
        if attn_mask is not None:
            mask = strip.of_mask(attn_mask)
            if mask.dtype == torch.bool:
                out.masked_fill_(~mask, self.call.plan.hides)
            else:
                out.add_(mask)
        for columns, bias in self.call.plan.biases(strip):
            out[..., columns] += bias
        return out


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched ``left @ right``, where ``left`` may have more heads: then neighbouring ones share a head of ``right``."""
    batch, heads, rows, inner = left.shape
    shared, columns = right.shape[1], right.shape[-1]
    left = left.reshape(batch * shared, heads // shared * rows, inner)
    right = right.reshape(batch * shared, inner, columns)
    if out is not None:
        out = out.view(batch * shared, heads // shared * rows, columns)
    return torch.bmm(left, right, out=out).view(batch, heads, rows, columns)


def product_of_keys(matrix: Tensor, right: Tensor, shared: int) -> Tensor:
    """Batched ``matrixᵀ @ right``, summed over the query heads that share a head of keys: (batch, shared, columns, width)."""
    batch, heads, rows, columns = matrix.shape
    matrix = matrix.reshape(batch * shared, heads // shared * rows, columns)
    right = right.reshape(batch * shared, heads // shared * rows, right.shape[-1])
    return torch.bmm(matrix.transpose(-1, -2), right).view(batch, shared, columns, right.shape[-1])


class KeySums:
    """Sums over queries, (B, heads, M, W), to which several workers add.

    Shares that do not have their heads to themselves add into tensors of their own, which are added up at the end, in the
    order of the shares: the result does not depend on who was faster.
    """

    def __init__(self, total: Tensor, shares: list[Share], per_query_head: bool) -> None:
        self.total, self.per_query_head = total, per_query_head
        self._parts = {share: self._of(share) if share.alone else None for share in shares}

    def add(self, share: Share, strip: Strip, product: Tensor) -> None:
        """Add a strip's product, (batch, heads, columns, W)."""
        part = self._parts[share]
        if part is None:
            part = self._parts[share] = torch.zeros_like(self._of(share))
        if self.per_query_head:
            start = strip.query_heads.start - share.query_heads.start
            part = part[:, start : start + product.shape[1]]
        for keys, columns in strip.pieces():
            part[:, :, keys.start - share.keys.start : keys.stop - share.keys.start].add_(product[:, :, columns])

    def finish(self) -> Tensor:
        """The sums, once every share has added its own."""
        for share, part in self._parts.items():
            if part is not None and not share.alone:
                self._of(share).add_(part)
        return self.total

    def _of(self, share: Share) -> Tensor:
        return self.total[share.batch, share.query_heads if self.per_query_head else share.key_heads, share.keys]


class _Call:
    """What all passes have in common: the inputs in the precision to work in, the queries scaled, and the plan.

    Logits are in units of ``unit`` nats, for 2ˣ: eˣ is up to 100 times as slow where it underflows. An additive mask is left
    in nats, since its extremes (the least number of its dtype, by custom) would overflow.
    """

    def __init__(self, scores: Scores, plan: Plan) -> None:
        self.scores, self.plan = scores, plan
        self.unit = math.log(2) if plan.hides > -math.inf else 1.0
        self.query = scores.query.to(plan.dtype) * (scores.scale / self.unit)
        self.key = scores.key.to(plan.dtype)

    def new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.plan.dtype, device=self.query.device)

    def cast(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.plan.dtype)

    def exp(self, logits: Tensor, out: Tensor) -> Tensor:
        """The exponentials of differences of logits."""
        if self.unit == 1:
            logits = torch.mul(logits, 1 / math.log(2), out=out)
        return torch.exp2(logits, out=out)

    def least(self) -> float:
        """Below the logits of all pairs that are seen, and so far above hidden ones that these weigh nothing."""
        return torch.finfo(self.plan.dtype).min if self.plan.hides == -math.inf else self.plan.hides / 2


class _Pass(_Call):
    """Strips divided among workers; a subclass says what to do with each."""

    def __init__(self, scores: Scores, request: Request, plan: Plan) -> None:
        super().__init__(scores, plan)
        self.values, self.weights = self.cast(request.values), self.cast(request.weights)
        self.values_per_query_head = self.values is not None and self.values.shape[1] != self.key.shape[1]
        self.shares = plan.shares(torch.get_num_threads() if scores.query.device.type == "cpu" else 1)

    def run(self) -> None:
        """Visit every strip."""
        _workers.each(self.visit, self.shares)

    def visit(self, share: Share) -> None:
        """Visit the strips of one share."""
        work = Workspace(self)
        for strip in share.strips:
            self.add(share, strip, work)

    def add(self, share: Share, strip: Strip, work: Workspace) -> None:
        raise NotImplementedError


class _Forward(_Pass):
    """The answer, strip by strip; rows are divided by their sums at the end."""

    def __init__(self, scores: Scores, request: Request, plan: Plan) -> None:
        super().__init__(scores, request, plan)
        batch, heads, queries, keys = scores.shape
        self.segments = request.segments
        self.highest, self.total = self.new(batch, heads, queries, 1), self.new(batch, heads, queries, 1)
        self.expected = self.new(batch, heads, queries, 1) if request.entropy else None
        self.mass = self.new(batch, heads, queries, len(request.segments)) if request.segments else None
        self.forward = self.transposed = None
        if self.values is not None:
            self.forward = self.new(batch, heads, queries, self.values.shape[-1])
        if self.weights is not None:
            self.transposed = KeySums(self.new(batch, heads, keys, self.weights.shape[-1]), self.shares, True)

    def answer(self) -> Answer:
        """Visit every strip and gather what they gave; a row that sees nothing has a sum of 0."""
        self.run()
        logs, total = self.total.log(), self.total.clamp(min=1)
        entropy = None
        if self.expected is not None:
            entropy = (total.log() - self.expected.mul_(self.unit) / total).squeeze(-1).clamp_(min=0)
        return Answer(
            (self.highest * self.unit + logs).squeeze(-1),
            None if self.forward is None else self.forward.div_(total),
            None if self.transposed is None else self.transposed.finish(),
            entropy=entropy,
            mass=None if self.mass is None else self.mass.div_(total),
        )

    def add(self, share: Share, strip: Strip, work: Workspace) -> None:
        shifted = work.logits(strip, strip.of_keys(self.key))
        highest = torch.amax(shifted, dim=-1, keepdim=True).clamp_(min=self.least())
        strip.of_queries(self.highest).copy_(highest)
        shifted.sub_(highest)
        exps = self.exp(shifted, work.buffer("exps", strip) if self.expected is not None else shifted)
        total = exps.sum(dim=-1, keepdim=True)
        strip.of_queries(self.total).copy_(total)
        if self.expected is not None:
            if self.plan.hides == -math.inf:  # a hidden key's −inf · 0 counts as nothing
                shifted.clamp_(min=torch.finfo(shifted.dtype).min)
            strip.of_queries(self.expected).copy_(shifted.mul_(exps).sum(dim=-1, keepdim=True))
        if self.mass is not None:
            self._add_masses(self.mass, strip, exps)
        if self.forward is not None and self.values is not None:
            values = strip.of_keys(self.values, self.values_per_query_head)
            strip.of_queries(self.forward).copy_(product(exps, values))
        if self.transposed is not None and self.weights is not None:
            weights = strip.of_queries(self.weights) / total.clamp_(min=1)  # a row that sees something has at least 1
            self.transposed.add(share, strip, product_of_keys(exps, weights, exps.shape[1]))

    def _add_masses(self, mass: Tensor, strip: Strip, exps: Tensor) -> None:
        part = strip.of_queries(mass)
        for number, runs in enumerate(self.segments):
            for keys, columns in strip.pieces():
                for run in runs:
                    start, stop = max(run.start, keys.start), min(run.stop, keys.stop)
                    if start < stop:
                        before = columns.start - keys.start
                        part[..., number] += exps[..., start + before : stop + before].sum(dim=-1)


class _Backward(_Pass):
    """Gradients of one pass, summed up strip by strip, each of which is evaluated again.

    With ``dP = dO Vᵀ + W dTᵀ`` the logits' gradient is ``P ⊙ (dP − rowsum(P ⊙ dP) + dL − dH (log P + H))``.
    """

    def __init__(self, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        super().__init__(ctx.scores, ctx.request, ctx.plan)
        *inputs, logsumexp, self.entropy = ctx.saved_tensors
        self.inputs: list[Tensor | None] = inputs
        self.logsumexp = logsumexp.masked_fill(logsumexp.isneginf(), math.inf).unsqueeze(-1) / self.unit
        self.d_logsumexp, self.d_forward, self.d_transposed, self.d_entropy = gradients
        d_query, d_key, d_mask, d_values, d_weights = (
            None if tensor is None or not need else self.new(*tensor.shape)
            for tensor, need in zip(inputs, ctx.needs_input_grad[3:], strict=True)
        )
        self.d_query, self.d_mask, self.d_weights = d_query, d_mask, d_weights
        self.d_key = None if d_key is None else KeySums(d_key, self.shares, False)
        self.d_values = None if d_values is None else KeySums(d_values, self.shares, self.values_per_query_head)

    def gradients(self) -> list[Tensor | None]:
        if self.d_mask is not None:  # its dimensions of size 1 are written to by every share
            for share in self.shares:
                self.visit(share)
        else:
            self.run()
        d_key = None if self.d_key is None else self.d_key.finish().mul_(self.unit)
        d_values = None if self.d_values is None else self.d_values.finish()
        sums = (self.d_query, d_key, self.d_mask, d_values, self.d_weights)
        return [
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, self.inputs, strict=True)
        ]

    def add(self, share: Share, strip: Strip, work: Workspace) -> None:
        key = strip.of_keys(self.key)
        matrix = work.logits(strip, key).sub_(strip.of_queries(self.logsumexp))
        self.exp(matrix, matrix)
        if self.d_values is not None and self.d_forward is not None:
            shared = matrix.shape[1] if self.values_per_query_head else key.shape[1]
            part = product_of_keys(matrix, strip.of_queries(self.d_forward), shared)
            self.d_values.add(share, strip, part)
        if self.d_weights is not None and self.d_transposed is not None:
            strip.of_queries(self.d_weights).add_(product(matrix, strip.of_keys(self.d_transposed, True)))
        if self.d_query is None and self.d_key is None and self.d_mask is None:
            return
        d_logits = self._logit_gradient(strip, work, matrix)
        if self.d_query is not None:
            torch.mul(product(d_logits, key), self.scores.scale, out=strip.of_queries(self.d_query))
        if self.d_key is not None:
            part = product_of_keys(d_logits, strip.of_queries(self.query), key.shape[1])
            self.d_key.add(share, strip, part)
        if self.d_mask is not None:
            self._add_to_mask(self.d_mask, strip, d_logits)

    def _logit_gradient(self, strip: Strip, work: Workspace, matrix: Tensor) -> Tensor:
        d_matrix = work.buffer("d_matrix", strip)
        if self.values is not None and self.d_forward is not None:
            values = strip.of_keys(self.values, self.values_per_query_head)
            product(strip.of_queries(self.d_forward), values.transpose(-1, -2), d_matrix)
        else:
            d_matrix.zero_()
        if self.weights is not None and self.d_transposed is not None:
            d_transposed = strip.of_keys(self.d_transposed, True)
            d_matrix += product(strip.of_queries(self.weights), d_transposed.transpose(-1, -2))
        if self.d_entropy is not None and self.entropy is not None:
            log_matrix = matrix.log().clamp_(min=-1e30)  # so that 0 · it is 0
            log_matrix += strip.of_queries(self.entropy).unsqueeze(-1)
            d_matrix -= log_matrix * strip.of_queries(self.d_entropy).unsqueeze(-1)
        d_logits = torch.mul(matrix, d_matrix, out=d_matrix)
        shift = d_logits.sum(dim=-1, keepdim=True)
        if self.d_logsumexp is not None:
            shift -= strip.of_queries(self.d_logsumexp).unsqueeze(-1)
        return d_logits.addcmul_(matrix, shift, value=-1)

    def _add_to_mask(self, d_mask: Tensor, strip: Strip, d_logits: Tensor) -> None:
        for keys, columns in strip.pieces():
            parts = (strip.batch, strip.query_heads, strip.rows, keys)
            chosen = (slice(None) if size == 1 else part for size, part in zip(d_mask.shape, parts, strict=True))
            total = d_mask[tuple(chosen)]
            total += d_logits[..., columns].sum_to_size(total.shape)


class _Differentiable(torch.autograd.Function):
    """The forward pass, and a backward pass that evaluates each strip again instead of having stored it."""

    @staticmethod
    def forward(ctx: Any, scores: Scores, request: Request, plan: Plan, *tensors: Tensor | None) -> Any:
        answer = _Forward(scores, request, plan).answer()
        ctx.scores, ctx.request, ctx.plan = scores, request, plan
        ctx.save_for_backward(*tensors, answer.logsumexp, answer.entropy)
        return answer.logsumexp, answer.forward, answer.transposed, answer.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *_Backward(ctx, gradients).gradients()


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request from the visible tiles; differentiable in query, key, an additive mask, values and weights."""
    # The log-sum-exp of a half-precision row would not be good enough to make its probabilities again.
    request = replace(received_as_weights(request), dtype=torch.promote_types(request.dtype, torch.float32))
    plan = Plan(scores, _rule(scores), request.dtype)
    if scores.requires_grad or request.requires_grad:
        asked, request = request, segments_as_values(scores, request)
        tensors = (scores.query, scores.key, scores.mask, request.values, request.weights)
        apply: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = _Differentiable.apply
        logsumexp, forward, transposed, entropy = apply(scores, request, plan, *tensors)
        answer = segments_from_values(asked, Answer(logsumexp, forward, transposed, entropy=entropy))
    else:
        with torch.no_grad():
            answer = _Forward(scores, request, plan).answer()
    return received_from_weights(request, answer)


def _rule(scores: Scores) -> Mask:
    return window(None, None) if scores.rule is None else scores.rule


@torch.no_grad()
def softmax_strips(scores: Scores) -> Iterator[tuple[Strip, Tensor]]:
    """Each strip with its probabilities, (batch, query heads, rows, columns); they are overwritten by the next."""
    plan = Plan(scores, _rule(scores), scores.dtype)
    call = _Call(scores, plan)
    work = Workspace(call)
    for strip in plan.strips():
        logits = work.logits(strip, strip.of_keys(call.key))
        logits.sub_(logits.amax(dim=-1, keepdim=True).clamp_(min=call.least()))
        call.exp(logits, logits)
        yield strip, logits.div_(logits.sum(dim=-1, keepdim=True).clamp_(min=1))


@torch.no_grad()
def viewers(scores: Scores, weights: Tensor) -> Tensor:
    """The sum of the weights (B|1, 1, N) of the queries that may see each key: (B, Hq, M)."""
    plan, (batch, heads, queries, keys) = Plan(scores, _rule(scores), scores.dtype), scores.shape
    weights = weights.expand(batch, heads, queries)
    sums = weights.new_zeros(batch, heads, keys)
    for strip in plan.strips():
        visible = weights.new_ones(strip.shape)
        for columns, bias in plan.biases(strip):
            visible[..., columns] *= bias == 0
        if scores.mask is not None:
            visible.masked_fill_(~strip.of_mask(scores.visible()), 0)
        part = (strip.of_queries(weights).unsqueeze(-2) @ visible).squeeze(-2)
        for span, columns in strip.pieces():
            sums[strip.batch, strip.query_heads, span] += part[..., columns]
    return sums
