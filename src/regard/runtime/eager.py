"""transformers' ``eager_attention_forward`` through the chain: attention with soft caps, sinks and biases, past SDPA."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from regard.runtime import chain
from regard.runtime.attention import attend, edited_dense
from regard.runtime.call import AttentionCall, without_hidden

NAME = "eager_attention_forward"

_PARAMETERS = {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "position_bias", "kwargs",
}  # fmt: skip
# What these functions are written with. One that names anything else computes something else, and is met at its softmax.
_WORDS = {
    "matmul", "transpose", "nn", "functional", "softmax", "float32", "to", "dtype", "dropout", "training", "contiguous",
    "repeat_kv", "num_key_value_groups", "size", "head_dim", "tanh", "sinks", "reshape", "expand", "shape", "cat", "max",
    "values", "F", "torch",
}  # fmt: skip


def holders(model: Module | None) -> Iterator[ModuleType]:
    """The modeling files of a model, or with None all that are imported, that have a function of this name."""
    if model is None:
        names = {name for name in list(sys.modules) if ".modeling_" in name}
    else:
        kinds = {type(module) for module in model.modules()}
        names = {base.__module__ for kind in kinds for base in kind.__mro__}
    for name in sorted(names):
        holder = sys.modules.get(name)
        if callable(getattr(holder, "__dict__", {}).get(NAME)):
            yield sys.modules[name]


@functools.cache
def wrapper(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function as it goes through the chain; None for one whose softmax is not what it would be taken for."""
    code = getattr(original, "__code__", None)
    if code is None or not {*code.co_names} <= _WORDS or not {*_arguments(code)} <= _PARAMETERS:
        return None

    @functools.wraps(original)
    def forward(
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *more: Any,
        **named: Any,
    ) -> Any:
        named |= dict(zip(_arguments(code)[5:], more, strict=False))
        run = functools.partial(original, module, query, key, value, attention_mask, **named)
        if not chain.looked_at() or not query.ndim == key.ndim == value.ndim == 4:
            return run()
        call = _call(code, module, query, key, value, attention_mask, **named)
        weights: list[Tensor] = []

        def make() -> Tensor:
            output, matrix = run()
            weights.append(matrix)
            transposed: Tensor = output.transpose(1, 2)
            return transposed

        def finish(last: AttentionCall, normal: AttentionCall) -> Tensor:
            with chain.unseen():
                output = attend(make, last, normal, share=False)
                if not weights:
                    weights.append(edited_dense(last))
            return output

        output = chain.intercept(call, finish)
        return output.transpose(1, 2).contiguous(), weights[0] if weights else None

    return forward


def _arguments(code: Any) -> tuple[str, ...]:
    further = code.co_kwonlyargcount + bool(code.co_flags & 0x08)  # **kwargs
    names: tuple[str, ...] = code.co_varnames[: code.co_argcount + further]
    return names


def _call(
    code: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    position_bias: Tensor | None = None, **_: Any,
) -> AttentionCall:  # fmt: skip
    """The call that the function's arguments stand for."""
    if scaling is None and "head_dim" in code.co_names:
        scaling = module.head_dim**-0.5
    mask = None if attention_mask is None else without_hidden(attention_mask.to(query.dtype))
    if position_bias is not None and "position_bias" in _arguments(code):
        mask = position_bias if mask is None else position_bias + mask
    return AttentionCall(
        query, key, value, mask,
        dropout_p=float(dropout) if module.training else 0.0,
        scale=None if scaling is None else float(scaling),
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=softcap if "tanh" in code.co_names else None,
        sinks=module.sinks if "sinks" in code.co_names else None,
    )  # fmt: skip
