"""nn.MultiheadAttention through the chain, also where its caller wants the matrix."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regard.runtime import chain
from regard.runtime.attention import edited_dense
from regard.runtime.call import AttentionCall

PLAIN = functional.multi_head_attention_forward
"""PyTorch's own ``multi_head_attention_forward``."""


def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, by the fused call that the chain goes by where its caller wants weights."""
    arguments = dict(zip(_parameters(), args, strict=False)) | kwargs
    if not arguments.get("need_weights", True) or not chain.looked_at():
        return PLAIN(**arguments)
    # PyTorch would leave the fused call for a stored matrix of its own, by the mask and not by the hint that it is causal.
    fused = arguments | {"need_weights": False, "is_causal": False}
    if chain.edited():
        with chain.finished() as calls:
            output, _ = PLAIN(**fused)
        return output, _weights(calls[0], arguments)
    with chain.unseen():
        answer = PLAIN(**arguments)
    with torch.no_grad():  # once more, to be read; without dropout, which would draw from the generator
        PLAIN(**(fused | {"dropout_p": 0.0}))
    return answer


def _weights(call: AttentionCall, arguments: dict[str, Any]) -> Tensor:
    """The matrix that the caller asked to have, with its dropout and its gradient, as PyTorch returns it."""
    matrix = edited_dense(call)
    matrix = functional.dropout(matrix, call.dropout_p) if call.dropout_p else matrix
    matrix = matrix.mean(dim=1) if arguments.get("average_attn_weights", True) else matrix
    return matrix if arguments["query"].ndim == 3 else matrix.squeeze(0)


@functools.cache
def _parameters() -> tuple[str, ...]:
    code = PLAIN.__code__
    return code.co_varnames[: code.co_argcount]
