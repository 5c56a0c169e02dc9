"""The portable kernel: strips of complete rows, one after another, in a reused buffer.

A strip holds a few query rows over all the keys they may see, so its softmax is exact in one pass and everything asked
of the matrix — products from either side, entropy — is read from it before the next strip overwrites it. Memory is
O(M · strip), whatever N is. It beats the online form, which must rescale its sums and needs a second pass for columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from regard.maps._request import Answer, Request, segments_as_values, segments_from_values
from regard.maps._scores import Scores, apply_mask_

# Numbers in one strip: a buffer that stays in a CPU's cache, or that keeps a GPU busy.
_STRIP = {"cpu": 2**20, "cuda": 2**26}
_ROWS_AT_LEAST = 128
# Hides a logit, and times a probability of 0 gives 0, which −inf would not.
_HIDDEN = -1e30


@dataclass(frozen=True)
class Strip:
    """Some rows of some heads: slices of the batch, of the key heads and of the queries, and the keys in reach."""

    batch: slice
    key_heads: slice
    rows: slice
    columns: int
    groups: int

    @property
    def query_heads(self) -> slice:
        return slice(self.key_heads.start * self.groups, self.key_heads.stop * self.groups)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        heads = (self.key_heads.stop - self.key_heads.start) * self.groups
        return self.batch.stop - self.batch.start, heads, self.rows.stop - self.rows.start, self.columns

    def of_queries(self, tensor: Tensor) -> Tensor:
        """This strip's part of a (B, Hq, N, …) tensor."""
        return tensor[self.batch, self.query_heads, self.rows]

    def of_keys(self, tensor: Tensor, per_query_head: bool = False) -> Tensor:
        """This strip's part of a (B, Hk, M, …) tensor, or of a (B, Hq, M, …) one."""
        return tensor[self.batch, self.query_heads if per_query_head else self.key_heads, : self.columns]

    def of_mask(self, mask: Tensor) -> Tensor:
        """This strip's part of a mask whose dimensions may be 1."""
        parts = (self.batch, self.query_heads, self.rows, slice(self.columns))
        return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, parts, strict=True))]


def strips(scores: Scores) -> Iterator[Strip]:
    """Cut the matrix into strips that fit the buffer."""
    batch, heads, queries, keys = scores.shape
    groups, key_heads = scores.groups, scores.key.shape[1]
    room = _STRIP.get(scores.query.device.type, _STRIP["cuda"])
    # Under a triangle a strip's upper half is partly wasted, so it is kept low, and made of more heads instead.
    fitting = 1 if scores.is_causal else room // (groups * keys)
    rows = min(queries, max(_ROWS_AT_LEAST // groups, fitting, 1))
    heads_at_once = max(1, min(key_heads, room // (groups * rows * keys)))
    batch_at_once = max(1, min(batch, room // (heads * rows * keys)))
    for b in range(0, batch, batch_at_once):
        for h in range(0, key_heads, heads_at_once):
            for start in range(0, queries, rows):
                stop = min(start + rows, queries)
                yield Strip(
                    batch=slice(b, min(b + batch_at_once, batch)),
                    key_heads=slice(h, min(h + heads_at_once, key_heads)),
                    rows=slice(start, stop),
                    columns=min(stop, keys) if scores.is_causal else keys,
                    groups=groups,
                )


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched ``left @ right``, where ``left`` may have more heads: then neighbouring ones share a head of ``right``."""
    batch, heads, rows, inner = left.shape
    shared, columns = right.shape[1], right.shape[-1]
    left = left.reshape(batch * shared, heads // shared * rows, inner)
    right = right.reshape(batch * shared, inner, columns)
    if out is not None:
        out = out.view(batch * shared, heads // shared * rows, columns)
    return torch.bmm(left, right, out=out).view(batch, heads, rows, columns)


class Workspace:
    """Casts of one call's tensors and the buffers that its strips are written into, one after another.

    Logits are in units of ``unit`` nats: 2ˣ is evaluated in half the time of eˣ. An additive mask is left in nats, since
    its extremes (the least number of its dtype, by custom) would overflow.
    """

    def __init__(self, scores: Scores, dtype: torch.dtype) -> None:
        self.scores = scores
        self.dtype = dtype
        additive = scores.mask is not None and scores.mask.is_floating_point()
        self.unit = 1.0 if additive else math.log(2)
        self.exp = torch.exp if additive else torch.exp2
        self.query = scores.query.to(dtype)
        self.key = scores.key.to(dtype).contiguous()
        self._buffers: dict[str, Tensor] = {}
        self._triangle = self.query.new_empty(0, 0)

    def buffer(self, name: str, strip: Strip) -> Tensor:
        """Uninitialised room for one strip; the same memory each time."""
        size = math.prod(strip.shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.query.device)
        return self._buffers[name][:size].view(strip.shape)

    def logits(self, strip: Strip) -> Tensor:
        """The strip's masked logits, in the buffer."""
        out = self.buffer("logits", strip)
        query = strip.of_queries(self.query) * (self.scores.scale / self.unit)
        product(query, strip.of_keys(self.key).transpose(-1, -2), out)
        if self.scores.mask is not None:
            apply_mask_(out, strip.of_mask(self.scores.mask))
        if self.scores.is_causal and strip.columns > strip.rows.start:
            out[..., strip.rows.start :] += self._hidden_triangle(strip)
        return out

    def probabilities(self, strip: Strip, logsumexp: Tensor) -> Tensor:
        """The strip of P, from log-sum-exps already known (+inf for rows that see nothing)."""
        logits = self.logits(strip).sub_(strip.of_queries(logsumexp).unsqueeze(-1) / self.unit)
        return self.exp(logits, out=logits)

    def _hidden_triangle(self, strip: Strip) -> Tensor:
        """What hides the part of a causal strip's last columns that lies above the diagonal."""
        rows, width = strip.rows.stop - strip.rows.start, strip.columns - strip.rows.start
        if self._triangle.shape[0] < rows:
            self._triangle = torch.full((rows, rows), _HIDDEN, dtype=self.dtype, device=self.query.device).triu_(1)
        return self._triangle[:rows, :width]


@torch.no_grad()
def softmax_strips(scores: Scores) -> Iterator[tuple[Strip, Tensor]]:
    """Each strip with its probabilities, (batch, query heads, rows, columns); they are overwritten by the next."""
    work = Workspace(scores, scores.dtype)
    for strip in strips(scores):
        logits = work.logits(strip)
        highest = logits.amax(dim=-1, keepdim=True)
        logits.sub_(highest.masked_fill_(highest.isneginf(), 0.0))
        work.exp(logits, out=logits)
        total = logits.sum(dim=-1, keepdim=True)
        yield strip, logits.div_(total.masked_fill_(total == 0, 1.0))


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request strip by strip; differentiable in query, key, mask, values and weights."""
    request = _receive_as_weights(request)
    if scores.requires_grad or request.requires_grad:
        asked, request = request, segments_as_values(scores, request)
        tensors = (scores.query, scores.key, scores.mask, request.values, request.weights)
        apply: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]] = _Differentiable.apply
        logsumexp, forward, transposed, entropy = apply(scores, request, *tensors)
        answer = segments_from_values(asked, Answer(logsumexp, forward, transposed, entropy=entropy))
    else:
        answer = _forward(scores, request)
    if request.received is None or answer.transposed is None:
        return answer
    return replace(answer, transposed=answer.transposed[..., :-1], received=answer.transposed[..., -1])


def _receive_as_weights(request: Request) -> Request:
    """What keys receive is one more column of weights."""
    if request.received is None:
        return request
    column = request.received.to(request.dtype).unsqueeze(-1)
    weights = column if request.weights is None else torch.cat([request.weights.to(request.dtype), column], dim=-1)
    return replace(request, weights=weights)


@torch.no_grad()
def _forward(scores: Scores, request: Request) -> Answer:
    batch, heads, queries, keys = scores.shape
    new = torch.empty(0, dtype=request.dtype, device=scores.query.device)
    values = None if request.values is None else request.values.to(request.dtype)
    weights = None if request.weights is None else request.weights.to(request.dtype)
    logsumexp = new.new_empty(batch, heads, queries)
    entropy = new.new_empty(batch, heads, queries) if request.entropy else None
    forward = None if values is None else new.new_empty(batch, heads, queries, values.shape[-1])
    transposed = None if weights is None else new.new_zeros(batch, heads, keys, weights.shape[-1])
    mass = new.new_empty(batch, heads, queries, len(request.segments)) if request.segments else None
    per_query_head = values is not None and values.shape[1] != scores.key.shape[1]
    work = Workspace(scores, request.dtype)
    for strip in strips(scores):
        shifted = work.logits(strip)
        highest = shifted.amax(dim=-1, keepdim=True)
        if scores.mask is not None:  # a row that sees nothing: exp(−inf − 0) = 0 throughout
            highest.masked_fill_(highest.isneginf(), 0.0)
        shifted.sub_(highest)
        exps = work.exp(shifted, out=work.buffer("exps", strip) if request.entropy else shifted)
        total = exps.sum(dim=-1, keepdim=True)
        strip.of_queries(logsumexp).copy_((highest * work.unit + total.log()).squeeze(-1))
        if scores.mask is not None:
            total.masked_fill_(total == 0, 1.0)
        if entropy is not None:
            if scores.mask is not None:  # a hidden key's −inf · 0 counts as nothing
                shifted.clamp_(min=torch.finfo(shifted.dtype).min)
            expected = shifted.mul_(exps).sum(dim=-1, keepdim=True) / total
            strip.of_queries(entropy).copy_((total.log() - expected * work.unit).squeeze(-1).clamp_(min=0))
        if mass is not None:
            part = strip.of_queries(mass)
            for number, runs in enumerate(request.segments):
                part[..., number] = sum(exps[..., run].sum(dim=-1) for run in runs)
            part.div_(total)
        if forward is not None and values is not None:
            strip.of_queries(forward).copy_(product(exps, strip.of_keys(values, per_query_head)).div_(total))
        if transposed is not None and weights is not None:
            part = product(exps.transpose(-1, -2), strip.of_queries(weights) / total)
            strip.of_keys(transposed, per_query_head=True).add_(part)
    return Answer(logsumexp, forward, transposed, entropy=entropy, mass=mass)


class _Differentiable(torch.autograd.Function):
    """The forward pass, and a backward pass that evaluates each strip again instead of having stored it."""

    @staticmethod
    def forward(ctx: Any, scores: Scores, request: Request, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        answer = _forward(scores, request)
        ctx.scores, ctx.request = scores, request
        ctx.save_for_backward(*tensors, answer.logsumexp, answer.entropy)
        return answer.logsumexp, answer.forward, answer.transposed, answer.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_Backward(ctx, gradients).run()


class _Backward:
    """Gradients of one pass, summed up strip by strip.

    With ``dP = dO Vᵀ + W dTᵀ`` the logits' gradient is ``P ⊙ (dP − rowsum(P ⊙ dP) + dL − dH (log P + H))``.
    """

    def __init__(self, ctx: Any, gradients: tuple[Tensor | None, ...]) -> None:
        query, key, mask, values, weights, logsumexp, self.entropy = ctx.saved_tensors
        self.scores: Scores = ctx.scores
        self.dtype: torch.dtype = ctx.request.dtype
        self.inputs = (query, key, mask, values, weights)
        self.values = None if values is None else values.to(self.dtype)
        self.weights = None if weights is None else weights.to(self.dtype)
        self.logsumexp = logsumexp.masked_fill(logsumexp.isneginf(), math.inf)
        self.d_logsumexp, self.d_forward, self.d_transposed, self.d_entropy = gradients
        needs = ctx.needs_input_grad[2:]
        self.sums = [
            torch.zeros_like(tensor, dtype=self.dtype, memory_format=torch.contiguous_format) if need else None
            for tensor, need in zip(self.inputs, needs, strict=True)
        ]

    def run(self) -> list[Tensor | None]:
        work = Workspace(self.scores, self.dtype)
        for strip in strips(self.scores):
            self._add(strip, work)
        return [
            None if total is None or tensor is None else total.to(tensor.dtype)
            for total, tensor in zip(self.sums, self.inputs, strict=True)
        ]

    def _add(self, strip: Strip, work: Workspace) -> None:
        d_query, d_key, d_mask, d_values, d_weights = self.sums
        matrix = work.probabilities(strip, self.logsumexp)
        if d_values is not None and self.d_forward is not None:
            part = product(matrix.transpose(-1, -2), strip.of_queries(self.d_forward))
            _add_shared(self._of_values(strip, d_values), part)
        if d_weights is not None and self.d_transposed is not None:
            strip.of_queries(d_weights).add_(product(matrix, strip.of_keys(self.d_transposed, per_query_head=True)))
        if d_query is None and d_key is None and d_mask is None:
            return
        d_logits = self._logit_gradient(strip, work, matrix)
        if d_query is not None:
            part = product(d_logits, strip.of_keys(work.key))
            strip.of_queries(d_query).add_(part, alpha=self.scores.scale)
        if d_key is not None:
            part = product(d_logits.transpose(-1, -2), strip.of_queries(work.query)) * self.scores.scale
            _add_shared(strip.of_keys(d_key), part)
        if d_mask is not None:
            part = strip.of_mask(d_mask)
            part += d_logits.sum_to_size(part.shape)

    def _of_values(self, strip: Strip, values: Tensor) -> Tensor:
        return strip.of_keys(values, values.shape[1] != self.scores.key.shape[1])

    def _logit_gradient(self, strip: Strip, work: Workspace, matrix: Tensor) -> Tensor:
        d_matrix = torch.zeros_like(matrix)
        if self.values is not None and self.d_forward is not None:
            values = self._of_values(strip, self.values).transpose(-1, -2)
            d_matrix += product(strip.of_queries(self.d_forward), values)
        if self.weights is not None and self.d_transposed is not None:
            d_matrix += product(
                strip.of_queries(self.weights), strip.of_keys(self.d_transposed, per_query_head=True).transpose(-1, -2)
            )
        d_logits = matrix * (d_matrix - (matrix * d_matrix).sum(dim=-1, keepdim=True))
        if self.d_logsumexp is not None:
            d_logits += matrix * strip.of_queries(self.d_logsumexp).unsqueeze(-1)
        if self.d_entropy is not None and self.entropy is not None:
            log_matrix = (
                matrix.log().clamp_(min=torch.finfo(matrix.dtype).min) + strip.of_queries(self.entropy)[..., None]
            )
            d_logits -= matrix * log_matrix * strip.of_queries(self.d_entropy).unsqueeze(-1)
        return d_logits


def _add_shared(total: Tensor, part: Tensor) -> None:
    """Add to heads of keys the sum over the query heads that share them."""
    batch, heads, rows, columns = part.shape
    total.add_(part.view(batch, total.shape[1], heads // total.shape[1], rows, columns).sum(dim=2))
