"""The end of the chain: PyTorch's attention, with what is read of its matrix, on whatever edits made of a call.

Terms that edits add to the logits ride in further columns of queries and keys:

    softmax(scale · Q Kᵀ + mask + Σ_e u_e w_eᵀ) V

is plain attention on ``[Q, u/scale]`` and ``[K, w]``, so that an edit costs a few columns and never an N×M matrix.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from regard.maps import AttentionMap
from regard.runtime.call import AttentionCall, Column, Factor, HiddenCall

_WIDTH = 8  # the fused operators want widths that are multiples of it
_FAR_BELOW = -60.0  # of a logit 0: together e⁻⁶⁰ weigh nothing, however many there are
_FEW_QUERIES = 8  # up to here a bias of (queries, keys) is smaller than a copy of the keys
_PARTS = {torch.float16: 2, torch.bfloat16: 3}  # numbers of a half precision that together hold a float32
# Hides a key, as a product of a query's number and a key's: such that no temperature brings it back.
_HIDDEN = {torch.float16: (-6e4, 6e4)}
_HIDDEN_ELSEWHERE = (-1e30, 1.0)


plain: Callable[..., Tensor] = functools.partial(
    torch.ops.aten.scaled_dot_product_attention.default._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd
)
"""PyTorch's own ``scaled_dot_product_attention``, past any interception."""


def attend(make: Callable[[], Tensor], last: AttentionCall, normal: AttentionCall, share: bool = True) -> Tensor:
    """The output of a call at the end of its chain, once what it carries to be read was read.

    Args:
        make: the output as the model's own call makes it.
        last: the call as it came through the chain.
        normal: as it went in, in four dimensions.
        share: whether the output may come from the pass that answers what is read.
    """
    if not last.readings or not _is_readable(last):
        return _output(make, last, normal)
    may_share = share and all(reading.shares for reading in last.readings) and not (last.edited or last.dropout_p)
    may_share = may_share and not last.requires_grad
    with torch.no_grad():
        attention = edited_map(last.detached())
        takes = [reading.ask(attention, last) for reading in last.readings]
        shared = attention.product_alongside(last.value) if may_share else None
        for take in takes:
            take()
    return _output(make, last, normal) if shared is None else _laid_out(shared, normal)


def read(call: HiddenCall) -> None:
    """What a mixer's call carries to be read, of its own matrix; no trace of it is left in the model's graph."""
    if not call.readings:
        return
    # Nor in what a checkpoint around it counts, if it has its own hooks.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.no_grad(), hooks:
        attention = call.map(call.place)
        for take in [reading.ask(attention, call) for reading in call.readings]:
            take()


def _output(make: Callable[[], Tensor], last: AttentionCall, normal: AttentionCall) -> Tensor:
    arguments = ("query", "key", "value", "attn_mask", "is_causal", "scale", "dropout_p", "rule")
    if last is normal:
        return make()
    if not last.edited and all(getattr(last, name) is getattr(normal, name) for name in arguments):
        output = make()
        shape = (*normal.query.shape[:3], output.shape[-1])
        return output if output.shape == shape else output.reshape(shape)
    return _laid_out(run(last).to(normal.value.dtype), normal)


def _laid_out(output: Tensor, call: AttentionCall) -> Tensor:
    """The output in memory as PyTorch's operator would have left it, for models take views of it."""
    if call.is_stored or call.softcap is not None or call.sinks is not None:  # which it does not know
        return output
    if call.query.shape[2] == 1:  # as in a step of decoding: it is the same either way
        return output.contiguous()
    choice = torch._fused_sdp_choice(
        call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal,
        scale=call.scale, enable_gqa=call.enable_gqa,
    )  # fmt: skip
    if choice == 0:
        return output.contiguous()
    strides = torch.empty_like(call.query, device="meta").stride()
    order = sorted(range(4), key=lambda dim: -strides[dim])
    if not _follows_query(call.query.device, call.query.dtype):
        order = [0, 2, 1, 3]
    return output.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])


@functools.cache
def _follows_query(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused operators of this PyTorch lay their output out as the query is, or as (batch, tokens, heads, …)."""
    query = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    return plain(query, query, query).is_contiguous()


def _is_readable(call: AttentionCall) -> bool:
    """Whether its tensors hold numbers of their own here; meta tensors hold none, those of subclasses elsewhere."""
    tensor = call.query
    if tensor.device.type != "meta" and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    kind = "meta" if tensor.device.type == "meta" else type(tensor).__name__
    warnings.warn(
        f"{call.place.path} was not read: of its tensors, {kind}, there is nothing to read here", stacklevel=2
    )
    return False


def run(call: AttentionCall) -> Tensor:
    """The output of an edited call, (B, H, N, Dv), exact but for rounding; differentiable."""
    call = _expand_heads(call)
    value, others = _values(call)
    output = _softmax_product(call, value)
    for rows, other in others:
        output = torch.where(rows[..., None], _softmax_product(call, other), output)
    if call.own is not None:
        output = torch.where(call.own[..., None], _own_values(call), output)
    if call.gate is not None:
        output = output * call.gate[..., None].to(output.dtype)
    return output if call.added is None else output + call.added.to(output.dtype)


def edited_map(call: AttentionCall) -> AttentionMap:
    """The attention matrix that the edits of the logits leave, as an operator that is never stored; differentiable."""
    bare = call.map()
    if not call.columns:
        return bare
    if call.softcap is not None:  # columns of queries and keys would be capped too; a mask is added after the cap
        return replace(call, attn_mask=_terms(call), is_causal=False, rule=None, columns=()).map()
    query, key = _widen(call)
    with torch.no_grad():
        added = sum(_largest(column) for column in call.columns if not column.hides)
        blind = _blind(call)
    return bare.with_columns(query, key, call.factor, added, blind)


def stored(call: AttentionCall) -> AttentionCall:
    """The call with its logits as its mask, for what is to be done to some of them alone; its columns stay apart."""
    bare = replace(
        call, query=call.query.detach()[..., :1] * 0, key=call.key.detach()[..., :1] * 0, scale=1.0, softcap=None
    )
    scores = (call.query * call.factor) @ call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1).mT
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = scores + _terms(replace(call, columns=()))
    return replace(bare, attn_mask=mask, is_causal=False, rule=None)


def _largest(column: Column) -> float:
    return float(column.query.abs().amax() * column.key.abs().amax())


def edited_dense(call: AttentionCall) -> Tensor:
    """The stored matrix of an edited call, with factors and rows of their own, (B, H, N, M): for who asks to have it."""
    matrix = edited_map(call).dense(force=True)
    for factor in call.factors:
        both = factor.query[..., None] & factor.key[:, None, None, :]
        matrix = torch.where(both, matrix * _factor_by_head(factor), matrix)
    if call.own is not None:
        start = call.place.query_start - call.place.key_start
        identity = torch.eye(call.query.shape[2], call.key.shape[2] - start, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(call.own[..., None], functional.pad(identity, (start, 0)), matrix)
    return matrix.to(call.query.dtype)


def _softmax_product(call: AttentionCall, value: Tensor) -> Tensor:
    """``P V`` for one V; rows whose keys are all hidden are zero."""
    if call.softcap is not None or call.sinks is not None:
        return _without_operator(call, value)
    if not call.columns and call.rule is None:
        return _attend(call, call.query, call.key, value, call.attn_mask, call.is_causal, call.scale)
    if call.query.shape[2] <= _FEW_QUERIES:
        return _with_bias(call, value)
    if call.rule is not None:
        return _without_operator(call, value)
    query, key = _widen(call)
    hidden = [column for column in call.columns if column.hides]
    witnesses = [_per_key_head(call, column.key)[..., None].to(value.dtype) for column in hidden]
    values = value.shape[-1]
    width = max(query.shape[-1], values + len(hidden))
    width += -width % _WIDTH
    value = torch.cat([value, *(w.expand(*value.shape[:-1], 1) for w in witnesses)], dim=-1) if hidden else value
    query, key, value = (functional.pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
    output = _attend(call, query, key, value, call.attn_mask, call.is_causal, call.factor)
    for number, column in enumerate(hidden):
        # A hidden key gets weight only where every key that the query may see is hidden.
        leaked = (output[..., values + number] > 0) & (column.query > 0)
        output = output.masked_fill(leaked[..., None], 0.0)
    return output[..., :values]


def _without_operator(call: AttentionCall, value: Tensor) -> Tensor:
    """``P V`` with a soft cap, sinks or a rule, none of which PyTorch's operator knows."""
    attention = edited_map(call)
    if not call.dropout_p:
        return attention @ value
    matrix = functional.dropout(attention.dense(force=True).to(value.dtype), call.dropout_p)
    return matrix @ value.repeat_interleave(matrix.shape[1] // value.shape[1], dim=1)


def _with_bias(call: AttentionCall, value: Tensor) -> Tensor:
    """``P V`` for a few queries, as in a decoding step: with a bias of (queries, keys) instead of wider keys."""
    key = ("bias", *map(id, call.columns), id(call.attn_mask), id(call.rule), call.is_causal)
    bias, blind, *_ = call.place.remember(key, lambda: (*_bias(call), call.columns, call.attn_mask, call.rule))
    output = _attend(call, call.query, call.key, value, bias, False, call.scale)
    return output if blind is None else output.masked_fill(blind, 0.0)


def _bias(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Mask, triangle and columns as one additive mask; which rows (B, H, N, 1) see nothing, None where nothing is hidden."""
    bias = _terms(call)
    hides = call.is_causal or any(column.hides for column in call.columns)
    if not hides and call.attn_mask is None and call.rule is None:
        return bias, None
    blind = bias.isneginf().all(dim=-1, keepdim=True)
    return bias.masked_fill(blind, 0.0), blind


def _terms(call: AttentionCall) -> Tensor:
    """All that is added to the logits, (B|1, H|1, N, M): mask, triangle, rule and columns."""
    batch, heads, queries, _ = call.query.shape
    queries, keys = call.query.shape[2], call.key.shape[2]
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    bias = torch.zeros(1, 1, queries, keys, device=call.query.device, dtype=dtype)
    if call.is_causal:
        later = torch.ones(queries, keys, dtype=torch.bool, device=bias.device).triu(1)
        bias = bias.masked_fill(later, -math.inf)
    if call.attn_mask is not None:
        mask = call.attn_mask
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    if call.rule is not None:
        visible = call.rule.dense(batch, heads, queries, keys, device=bias.device)
        bias = bias.masked_fill(~visible, -math.inf)
    for column in call.columns:
        term = column.query[..., None] * column.key[:, None, None, :]
        bias = bias.masked_fill(term > 0, -math.inf) if column.hides else bias + term
    return bias


def _blind(call: AttentionCall) -> Tensor | None:
    """(B, H, N): queries for which the edits hide every key that they may see; None where nothing is hidden."""
    hidden = [column for column in call.columns if column.hides]
    if not hidden:
        return None
    # Without queries and keys, logits are 0 where something is left to be seen, and far below that where it is hidden.
    columns = tuple(replace(column, query=column.query * _FAR_BELOW, hides=False) for column in hidden)
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = ~mask.isneginf()
    zeros = replace(
        call, query=torch.zeros_like(call.query), key=torch.zeros_like(call.key), attn_mask=mask, columns=columns,
        softcap=None, sinks=None,
    )  # fmt: skip
    return edited_map(zeros).logsumexp() < _FAR_BELOW / 2


def _widen(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Queries and keys with the columns of the edits."""
    batch, heads, queries, _ = call.query.shape
    dtype, scale = call.query.dtype, call.factor
    lefts, rights = [call.query], [call.key]
    of_query, of_key = _HIDDEN.get(dtype, _HIDDEN_ELSEWHERE)
    for column in call.columns:
        parts = [(column.query * of_query).to(dtype)] if column.hides else _split(column.query / scale, dtype)
        right = _per_key_head(call, column.key * of_key if column.hides else column.key).to(dtype)[..., None]
        lefts += [part.expand(batch, heads, queries)[..., None] for part in parts]
        rights += [right] * len(parts)
    return torch.cat(lefts, dim=-1), torch.cat(rights, dim=-1)


def _per_key_head(call: AttentionCall, keys: Tensor) -> Tensor:
    """(B, Hk, M) from (B|1, M)."""
    batch, heads, tokens, _ = call.key.shape
    return keys[:, None, :].expand(batch, heads, tokens)


def _split(term: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Parts in ``dtype`` that sum to the term in float32, in which the operators add them up."""
    parts = []
    for _ in range(_PARTS.get(dtype, 1)):
        parts.append(term.to(dtype))
        term = term - parts[-1].to(term.dtype)
    return parts


def _expand_heads(call: AttentionCall) -> AttentionCall:
    """Keys and values of each query head's own, where the factors differ between heads that share them."""
    groups = call.query.shape[1] // call.key.shape[1]
    if groups == 1 or not any(_differs_by_head(factor) for factor in call.factors):
        return call
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (call.key, call.value))
    return replace(call, key=key, value=value, enable_gqa=False)


def _values(call: AttentionCall) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """V, and as other sets of queries see it: (rows (B|1, H|1, N), value); later ones hold where several do."""
    value, others = call.value, list[tuple[Tensor, Tensor]]()
    for factor in call.factors:
        every_row = factor.query.shape[2] == 1
        keys = factor.key[:, None, :, None]
        scaled = functools.partial(
            _scaled, chosen=factor.query[..., None] & keys if every_row else keys, by=_factor_by_head(factor)
        )
        if every_row:
            value, others = scaled(value), [(rows, scaled(other)) for rows, other in others]
        else:
            others += [(factor.query, scaled(value)), *((rows & factor.query, scaled(other)) for rows, other in others)]
    return value, others


def _differs_by_head(factor: Factor) -> bool:
    return factor.query.shape[1] > 1 or (isinstance(factor.by, Tensor) and factor.by.shape[1] > 1)


def _factor_by_head(factor: Factor) -> float | Tensor:
    """The number, or (1, H|1, 1, 1)."""
    return factor.by[..., None] if isinstance(factor.by, Tensor) else factor.by


def _scaled(value: Tensor, chosen: Tensor, by: float | Tensor) -> Tensor:
    return torch.where(chosen, (value * by).to(value.dtype), value)


def _own_values(call: AttentionCall) -> Tensor:
    """The value at each query's own position."""
    start = call.place.query_start - call.place.key_start
    value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
    return value[:, :, start : start + call.query.shape[2]]


def _attend(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    return plain(query, key, value, mask, call.dropout_p, causal, scale=scale, enable_gqa=call.enable_gqa)
