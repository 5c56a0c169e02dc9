"""A model's own softmax over keys, followed to the product with its values: there it is a call of the chain."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Module, functional

from regard.runtime import chain
from regard.runtime.attention import attend
from regard.runtime.call import AttentionCall, stored_call
from regard.runtime.product import Layout, layout_of
from regard.runtime.stack import caller

plain: Callable[..., Tensor] = torch.ops.aten.softmax.int._op_dk
"""PyTorch's own ``softmax``, past any interception."""

_KEY = torch._C.DispatchKey.CompositeImplicitAutograd
_ROUNDING = 2e-2  # of rows in half precision, which need not sum to 1

# What leaves the numbers, in their order, what they are: then the logits are those of the matrix in the product.
_SAME = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "view", "view_as", "reshape",
    "flatten", "unflatten", "squeeze", "unsqueeze",
}  # fmt: skip
_DROPOUT = {functional.dropout, torch.dropout}
# What may leave a matrix of attention, though another one: where its rows are still shares of keys, they are its logits.
_FOLLOWED = {
    "permute", "transpose", "swapaxes", "movedim", "expand", "__getitem__", "narrow", "split", "chunk", "masked_fill",
    "masked_fill_", "where", "mul", "__mul__", "__rmul__", "__imul__", "mul_", "nan_to_num", "nan_to_num_", "detach",
    "__get__",
}  # fmt: skip


@dataclass(frozen=True)
class Softmax:
    """One softmax: its logits, along which dimension it was taken, and who took it where."""

    logits: Tensor
    dim: int
    module: Module
    line: str


@dataclass(frozen=True)
class _Way:
    """How a tensor came from a softmax: with the same numbers in the same order, or otherwise changed."""

    softmax: Softmax
    same: bool = True
    dropout_p: float = 0.0


class _Followed(threading.local):
    def __init__(self) -> None:
        self.tensors: list[ReferenceType[Tensor]] = []


_followed = _Followed()


def kernel(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """What runs in place of PyTorch's softmax, in every thread."""
    output = plain(_KEY, input, dim, dtype)
    if output.ndim < 3 or type(output) is not Tensor or not chain.looked_at():
        return output
    module, line = caller()
    if module is None:
        return output
    softmax = Softmax(input, dim % output.ndim, module, line)
    chain.note_softmax(module, line)
    _follow(output, _Way(softmax))
    return output


class Weights(Tensor):
    """A softmax's result until the product that it enters; then it is a tensor like any other again."""

    _way: _Way

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, and follow what comes of the weights."""
        kwargs = kwargs or {}
        layout = layout_of(function, args, lambda operand: isinstance(operand, Weights))
        if layout is not None and chain.looked_at():
            return _call(function, args, kwargs, layout)
        with torch._C.DisableTorchFunctionSubclass():
            output = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        way = next(way for tensor in _tensors((args, kwargs)) if (way := _way_of(tensor)) is not None)
        if function in _DROPOUT:
            _follow(output, replace(way, dropout_p=max(way.dropout_p, _dropout_p(*args, **kwargs))))
        elif name in _SAME:
            _follow(output, way)
        elif name in _FOLLOWED:
            _follow(output, replace(way, same=False))
        return output


def release(softmax: Softmax | None = None) -> None:
    """Let what is followed in this thread, of one softmax or of all, be plain tensors again."""
    left = []
    for reference in _followed.tensors:
        tensor = reference()
        if isinstance(tensor, Weights):
            if softmax is None or tensor._way.softmax is softmax:
                del tensor._way
                tensor.__class__ = Tensor  # type: ignore[assignment]
            else:
                left.append(reference)
    _followed.tensors = left


def _follow(output: Any, way: _Way) -> None:
    for tensor in _tensors(output):
        if tensor.__class__ is Tensor and tensor.is_floating_point():
            tensor.__class__ = Weights
            _followed.tensors.append(ref(tensor))
        if isinstance(tensor, Weights):
            tensor._way = way


def _way_of(tensor: Tensor) -> _Way | None:
    return tensor.__dict__.get("_way") if isinstance(tensor, Weights) else None


def _dropout_p(input: Tensor, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> float:
    return p if training else 0.0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# --- the product --------------------------------------------------------------------------------------------------------


def _call(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], layout: Layout) -> Tensor:
    """The product of a matrix with values, as a call of the chain."""
    matrix: Any = layout.matrix
    way: _Way = matrix._way
    release(way.softmax)
    if (
        way.softmax.logits.shape[way.softmax.dim] - matrix.shape[layout.key_dim] > 1
    ):  # one is a sink that was put beside the keys
        chain.note_part(way.softmax.module, way.softmax.line)
        return function(*args, **kwargs)  # type: ignore[no-any-return]
    dtypes = []

    def product() -> Tensor:
        output: Tensor = function(*args, **kwargs)
        dtypes.append(output.dtype)
        return output

    call = _attention_call(matrix, way, layout)
    if call is None:
        return product()
    chain.forget_softmax(way.softmax.module, way.softmax.line)

    def finish(last: AttentionCall, normal: AttentionCall) -> Tensor:
        return attend(lambda: layout.output(product(), call), last, normal, share=False)

    output = chain.intercept(call, finish)
    return layout.undo(output.to(dtypes[0] if dtypes else layout.dtype))


def _attention_call(matrix: Tensor, way: _Way, layout: Layout) -> AttentionCall | None:
    """The call; None where the matrix holds no shares of keys."""
    heads = _heads(caller()[0]) or _heads(way.softmax.module)
    logits, sinks = way.softmax.logits, None
    keys_last = way.softmax.dim == logits.ndim - 1
    if way.same and (logits.shape == matrix.shape or (keys_last and logits.shape[-1] == matrix.shape[-1])):
        key_dim = way.softmax.dim if logits.shape == matrix.shape else matrix.ndim - 1
        if key_dim != layout.key_dim:
            return None
        logits = logits.reshape(matrix.shape)
    else:
        found = _shares(layout.of_matrix(matrix, heads))
        if found is None:
            return None
        logits, sinks = found
        return stored_call(logits, layout.of_values(heads), sinks)
    return stored_call(layout.of_matrix(logits, heads), layout.of_values(heads), dropout_p=way.dropout_p)


def _shares(matrix: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The logits of rows that are shares of keys, and of what goes to no key, (B, H, N), if that is much."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    total = wide.sum(dim=-1)
    if bool((wide < 0).any()) or not bool((total <= 1 + _ROUNDING).all()):
        return None
    there = wide > 0
    logits = torch.where(there, wide, 1.0).log().masked_fill(~there, -math.inf)
    rest = torch.where(there.any(dim=-1), 1 - total, 0.0).clamp(min=0.0)
    if bool((rest <= _ROUNDING).all()):
        return logits, None
    return logits, torch.where(rest > 0, rest, 1.0).log().masked_fill(rest <= 0, -math.inf)


def _heads(module: Any) -> int | None:
    """How many heads a module of attention has, where it says."""
    for holder in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_head", "heads", "nhead"):
            number = getattr(holder, name, None)
            if isinstance(number, int) and number > 0:
                return number
    return None
