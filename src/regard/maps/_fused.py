"""The fused kernel: PyTorch's own flash and memory-efficient operators, asked for more than ``P V``.

They return the log-sum-exp beside the output. Further columns ride along in V (the keys, for the entropy; indicators,
for masses). The transposed products come from one more call with queries and keys in each other's place,

    P[i, j] = exp(scale · k_j·q_i − L_i),   so   Pᵀ W = exp(L'_j) · softmax_i(scale · k_j·q_i − L_i) W,

where −L_i rides in extra columns of the heads and L' is that call's own log-sum-exp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from regard.maps._request import ALIGNMENT, Answer, RefusedError, Request, segments_as_values, segments_from_values
from regard.maps._scores import Scores

# Stands for log 0 in an extra column: finite, so that 0 · it stays 0, and far below any logit.
_HIDDEN = -1e30


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request with one fused call, and one more for each question from the matrix's other side."""
    if scores.requires_grad or request.requires_grad:
        raise RefusedError("the fused operators' log-sum-exp has no gradient")
    if scores.softcap is not None or scores.sinks is not None:
        raise RefusedError("the fused operators know neither a soft cap nor sinks")
    if scores.is_causal and scores.mask is not None:
        raise RefusedError("the fused operators take a triangle or a mask, not both")
    if scores.scale <= 0:
        raise RefusedError(
            "the fused operators hide keys before they scale, and a shift of the logits is divided by it"
        )
    if request.entropy and scores.is_biased:
        raise RefusedError("with an additive mask the entropy needs the expected bias, which no column can carry")
    with torch.no_grad():
        return segments_from_values(request, _evaluate(scores, segments_as_values(scores, request)))


def _evaluate(scores: Scores, request: Request) -> Answer:
    dtype, groups = request.dtype, scores.groups
    query = scores.query.to(dtype)
    key = scores.key.to(dtype).repeat_interleave(groups, dim=1)
    columns = [] if request.values is None else [_per_query_head(request.values.to(dtype), groups, key.shape[1])]
    if request.entropy:
        columns.append(key)
    value = torch.cat(columns, dim=-1) if len(columns) > 1 else (columns or [key])[0]
    output, logsumexp = _attend(query, key, value, scores)
    blind = None if scores.mask is None else ~scores.visible().any(dim=-1)
    if blind is not None:
        logsumexp, output = logsumexp.masked_fill(blind, -math.inf), output.masked_fill(blind.unsqueeze(-1), 0.0)
    entropy = forward = transposed = received = None
    if request.entropy:
        expected = scores.scale * (query * output[..., -key.shape[-1] :]).sum(dim=-1)
        entropy = (logsumexp - expected).clamp_(min=0)  # a row that sees nothing has −inf − 0, and so 0
    if request.values is not None:
        forward = output[..., : request.values.shape[-1]]
    if request.weights is not None:
        transposed, _ = _swapped(scores, dtype, logsumexp, request.weights)
    if request.received is not None:
        # The answer is a log-sum-exp, which the operators keep in float32 even where their inputs are bfloat16. (A bias
        # would be rounded, though, and float16 has no room for the extra columns.)
        native = scores.query.dtype == torch.bfloat16 and not scores.is_biased
        _, received = _swapped(scores, torch.bfloat16 if native else dtype, logsumexp - request.received.log(), None)
    return Answer(logsumexp, forward, transposed, received, entropy)


def _per_query_head(values: Tensor, groups: int, heads: int) -> Tensor:
    return values if values.shape[1] == heads else values.repeat_interleave(groups, dim=1)


def _swapped(scores: Scores, dtype: torch.dtype, logsumexp: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Pᵀ weights`` and ``Pᵀ 1`` by the call with queries and keys in each other's place."""
    query, keys = scores.query.to(dtype), scores.key.shape[2]
    key = scores.key.to(dtype).repeat_interleave(scores.groups, dim=1)
    shift = -logsumexp / scores.scale
    parts = _split(shift.masked_fill(~shift.isfinite(), _HIDDEN).unsqueeze(-1), dtype)
    swapped_key = torch.cat([query, *parts], dim=-1)
    swapped_query = torch.cat([key, key.new_ones(*key.shape[:-1], len(parts))], dim=-1)
    values = query if weights is None else weights.to(dtype)
    mask = None if scores.mask is None else scores.mask.transpose(-1, -2)
    if scores.is_causal:  # "query i sees key j ≤ i" is again a top-left triangle once both sequences run backwards
        swapped_query = _to_length(swapped_query, query.shape[2]).flip(2)
        swapped_key, values = swapped_key.flip(2), values.flip(2)
    turned = Scores(swapped_query, swapped_key, mask, scores.is_causal, scores.scale)
    output, logsum = _attend(swapped_query, swapped_key, values, turned)
    sums = logsum.exp().unsqueeze(-1)
    both = torch.cat([output * sums, sums], dim=-1)
    if scores.is_causal:
        both = _to_length(both.flip(2), keys)
    both = both.masked_fill(~_seen_by_something(scores).unsqueeze(-1), 0.0)
    return both[..., :-1], both[..., -1]


def _split(column: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The column as parts in ``dtype`` that sum to it in float32, where the operators add them up."""
    if dtype in (torch.float32, torch.float64):
        return [column.to(dtype)]
    high = column.to(dtype)
    middle = (column - high).to(dtype)
    return [high, middle, (column - high - middle).to(dtype)]


def _to_length(tensor: Tensor, tokens: int) -> Tensor:
    """Cut or pad the token dimension with zeros at its end."""
    return functional.pad(tensor, (0, 0, 0, tokens - tensor.shape[2]))


def _seen_by_something(scores: Scores) -> Tensor:
    """(…, M): whether a key is seen by any query at all."""
    if scores.is_causal:
        return torch.arange(scores.shape[3], device=scores.query.device) < scores.shape[2]
    return scores.visible().any(dim=-2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """One call of the device's operator: (P value, log-sum-exp), all widths brought to one multiple of eight."""
    bias = _bias(scores, query.dtype)
    values = value.shape[-1]
    width = max(query.shape[-1], values)
    width += -width % ALIGNMENT
    query, key, value = (_to_width(tensor, width) for tensor in (query, key, value))
    operator = {"cpu": _attend_cpu, "cuda": _attend_cuda}.get(query.device.type)
    if operator is None:
        raise RefusedError(f"PyTorch has no fused attention that returns the log-sum-exp on {query.device.type}")
    try:
        output, logsumexp = operator(query, key, value, bias, scores.is_causal, scores.scale)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise RefusedError(f"the fused operator refused: {error}") from error
    wide = torch.promote_types(query.dtype, torch.float32)
    return output[..., :values].to(wide), logsumexp[..., : query.shape[2]].to(wide)


def _to_width(tensor: Tensor, width: int) -> Tensor:
    """Padded, with neighbouring entries side by side: the operators read on from a head's first one."""
    tensor = functional.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(scores: Scores, dtype: torch.dtype) -> Tensor | None:
    """The mask as the operators take it: additive, in the queries' dtype, finite in rows that see nothing."""
    if scores.mask is None:
        return None
    visible = scores.visible()
    sees_something = visible.any(dim=-1, keepdim=True)
    bias = torch.zeros_like(scores.mask, dtype=dtype) if scores.mask.dtype == torch.bool else scores.mask.to(dtype)
    return bias.masked_fill(~visible & sees_something, -math.inf).masked_fill(~sees_something, 0.0)


def _attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = operator(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    return output, logsumexp


def _attend_cuda(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    square = query.shape[2] == key.shape[2]
    if bias is None and query.dtype in (torch.float16, torch.bfloat16) and (square or not is_causal):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        result = flash(query, key, value, 0.0, is_causal, False, scale=scale)
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        shape = (*query.shape[:3], key.shape[2])
        bias = None if bias is None else _align(bias.expand(shape))
        result = efficient(query, key, value, bias, True, 0.0, is_causal, scale=scale)
    return result[0], result[1]


def _align(bias: Tensor) -> Tensor:
    """The memory-efficient operator reads the bias in steps of eight or more: give its rows that stride."""
    keys = bias.shape[-1]
    return functional.pad(bias, (0, -keys % 16))[..., :keys]
