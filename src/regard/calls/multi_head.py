"""nn.MultiheadAttention through the seam, also where its caller wants the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn import functional

from regard.calls.call import AttentionCall
from regard.calls.run import edited_dense
from regard.maps import AttentionMap

_PLAIN = functional.multi_head_attention_forward


def multi_head_attention(
    keeping: Callable[[], AbstractContextManager[list[AttentionCall]]], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` by the fused call that the seam sees; ``keeping`` collects the calls that run."""
    arguments = dict(zip(_parameters(), args, strict=False)) | kwargs
    if not arguments.get("need_weights", True):
        return _PLAIN(**arguments)
    # PyTorch would leave the fused call for a stored matrix of its own; ours is put in its place.
    with keeping() as kept:
        output, _ = _PLAIN(**(arguments | {"need_weights": False}))
    weights = _weights(kept[0])
    weights = weights.mean(dim=1) if arguments.get("average_attn_weights", True) else weights
    batched = arguments["query"].ndim == 3
    return output, weights if batched else weights.squeeze(0)


def _weights(call: AttentionCall) -> Tensor:
    """The matrix that the caller asked to have, with its dropout and its gradient, as PyTorch returns it."""
    if call.edited:
        return edited_dense(call)
    attention = AttentionMap(call.query, call.key, call.attn_mask, call.is_causal, call.scale, call.enable_gqa)
    matrix = attention.dense(force=True).to(call.query.dtype)
    return functional.dropout(matrix, call.dropout_p) if call.dropout_p else matrix


@functools.cache
def _parameters() -> tuple[str, ...]:
    code = _PLAIN.__code__
    return code.co_varnames[: code.co_argcount]
