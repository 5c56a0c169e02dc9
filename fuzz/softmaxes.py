"""Every softmax that a model takes, and what becomes of it: an independent witness of where a model attends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAXES = {functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.einsum,
    torch.baddbmm,
    Tensor.baddbmm,
}
_SAME_NUMBERS = {
    "dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double", "view", "reshape", "permute", "transpose",
    "contiguous", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "clone", "__getitem__",
    "narrow", "split", "chunk",
    "movedim", "swapaxes", "view_as", "unbind", "t", "mT", "detach", "__get__", "cat", "stack", "repeat",
    "repeat_interleave", "index_select",
    "unfold", "pad", "roll", "expand_dims", "masked_fill", "masked_fill_", "nan_to_num", "where", "gather", "feature_dropout",
}  # fmt: skip
_POINTWISE = {
    "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "__isub__", "mul", "__mul__",
    "__rmul__", "__imul__", "mul_", "div", "__truediv__", "__itruediv__", "div_", "true_divide",
    "tanh", "clamp", "clip", "maximum", "minimum", "sigmoid", "softplus", "exp", "log", "neg", "abs", "pow",
}  # fmt: skip


@dataclass
class Softmax:
    """One softmax: where it is taken, of what, and the first product that it enters."""

    module: str
    kind: str
    place: str
    shape: list[int]
    dim: int
    dtype: str
    of_product: str = ""  # the product that its input descends from
    way: list[str] = field(default_factory=list)  # what is done to it up to the product
    consumer: str = ""
    operand: int = -1
    shapes: list[list[int]] = field(default_factory=list)
    equation: str = ""
    in_eager: bool = False
    returned: bool = False
    output: Tensor | None = field(default=None, repr=False)

    def row(self) -> dict[str, Any]:
        """As it is written to a file."""
        return {name: value for name, value in self.__dict__.items() if name != "output"}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix that a module multiplied values with, by the sums over its queries, each query weighted: see `weighted`."""

    module: str
    sums: Tensor


def weighted(matrix: Tensor) -> Tensor:
    """``Σ_i cos(i) P_ij`` of (…, queries, keys), flat: it tells a matrix from its transpose and from its rows reordered."""
    matrix = matrix.to(torch.float64)
    weights = torch.arange(matrix.shape[-2], dtype=torch.float64).cos()
    return torch.einsum("i,...ij->...j", weights, matrix).flatten()


class Witness(TorchFunctionMode):
    """Follows softmaxes through a forward pass, function by function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.softmaxes: list[Softmax] = []
        self.sdpa: list[str] = []
        self.matrices: list[Matrix] = []
        self.eager: list[dict[str, Any]] = []
        self.inside_eager = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._kept: list[Any] = []  # so that no id is given twice
        self._from_softmax: dict[int, tuple[Softmax, list[str]]] = {}
        self._from_product: dict[int, str] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        try:
            self._see(func, args, kwargs, output)
        except Exception as error:  # the model goes on
            self.error = error
        return output

    def _see(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = getattr(func, "__name__", str(func))
        if func is functional.scaled_dot_product_attention:
            self.sdpa.append(self._module())
            self.matrices.append(Matrix(self._module(), weighted(_of_sdpa(*args, **kwargs))))
            return
        inputs = list(tensors([args, kwargs]))
        if func in _SOFTMAXES:
            self._softmax(args, kwargs, output)
            return
        outputs = list(tensors([output]))
        tracked = [(i, t) for i, t in enumerate(inputs) if id(t) in self._from_softmax]
        if func in _PRODUCTS or name in ("linear", "conv2d", "conv1d", "addmm", "mm", "mv", "dot"):
            for i, t in tracked:
                softmax, way = self._from_softmax[id(t)]
                if not softmax.consumer or (softmax.consumer in ("linear", "conv2d")):
                    if softmax.consumer:
                        way = [*way, softmax.consumer]
                    softmax.consumer, softmax.operand, softmax.way = name, i, way
                    softmax.shapes = [list(x.shape) for x in inputs]
                    softmax.equation = args[0] if name == "einsum" else ""
                    matrix = _of_product(name, args, i, t) if func in _PRODUCTS else None
                    if matrix is not None:
                        self.matrices.append(Matrix(softmax.module, weighted(matrix)))
                if name in ("linear", "conv2d"):
                    for out in outputs:
                        self._keep(out)
                        self._from_softmax[id(out)] = (softmax, [*way, name])
            if func in _PRODUCTS:
                for out in outputs:
                    self._keep(out)
                    both = "both" if not any(isinstance(x, nn.Parameter) for x in inputs) else "weight"
                    self._from_product[id(out)] = f"{name}:{both}"
            return
        follow = name in _SAME_NUMBERS or name in _POINTWISE
        if tracked:
            softmax, way = self._from_softmax[id(tracked[0][1])]
            if (follow and name not in ("__get__",)) or (name == "__get__" and outputs):
                others = [t for t in inputs if t is not tracked[0][1] and t.numel() > 1]
                mark = name if name in _SAME_NUMBERS or not others else f"{name}:{list(others[0].shape)}"
                for out in outputs:
                    if out is tracked[0][1]:
                        continue
                    self._keep(out)
                    self._from_softmax[id(out)] = (softmax, [*way, mark])
            elif not softmax.consumer and outputs:
                softmax.way = [*way, f"…{name}"]
        if follow or name in ("fill_diagonal_",):
            source = next((self._from_product[id(t)] for t in inputs if id(t) in self._from_product), None)
            if source:
                for out in outputs:
                    self._keep(out)
                    self._from_product[id(out)] = source

    def _softmax(self, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        scores = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dim = -1 if dim is None else dim
        softmax = Softmax(
            self._module(), type(self._stack[-1]).__name__ if self._stack else "", _place(), list(scores.shape),
            dim - scores.ndim if dim >= 0 else dim, str(output.dtype)[6:], self._from_product.get(id(scores), ""),
            in_eager=bool(self.inside_eager), output=output,
        )  # fmt: skip
        self.softmaxes.append(softmax)
        self._keep(output)
        self._keep(scores)
        self._from_softmax[id(output)] = (softmax, [])

    def _keep(self, value: Any) -> None:
        self._kept.append(value)

    def _module(self) -> str:
        return self._names.get(self._stack[-1], "?") if self._stack else ""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the model's modules and its eager attention in the block."""
        handles = []

        def ended(*_: Any) -> None:
            self._stack.pop()

        for module in self._names:
            handles.append(module.register_forward_pre_hook(lambda m, _: self._stack.append(m)))
            handles.append(module.register_forward_hook(ended, always_call=True))
        wrapped = list(_eager_functions())
        for owner, function in wrapped:
            owner.eager_attention_forward = self._wrap(function)
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, function in wrapped:
                owner.eager_attention_forward = function

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def eager_attention_forward(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.eager.append(
                {
                    "module": self._names.get(module, ""), "file": function.__module__.rpartition(".")[2],
                    "kwargs": {n: _brief(v) for n, v in kwargs.items() if v is not None}, "none": [n for n,
                    v in kwargs.items() if v is None],
                    "positional": [_brief(a) for a in args],
                    "shapes": [list(query.shape), list(key.shape), list(value.shape)],
                    "groups": getattr(module, "num_key_value_groups", None), "sinks": hasattr(module, "sinks"),
                }
            )  # fmt: skip
            self.inside_eager += 1
            try:
                return function(module, query, key, value, *args, **kwargs)
            finally:
                self.inside_eager -= 1

        eager_attention_forward.__module__ = function.__module__
        return eager_attention_forward


def _of_sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The matrix of a call of scaled_dot_product_attention, in float64."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).nan_to_num(0)  # a query that sees nothing


def _of_product(name: str, args: Any, operand: int, matrix: Tensor) -> Tensor | None:
    """The matrix that is an operand of a product, as (…, queries, keys); None where that is no product with values."""
    if name != "einsum":
        is_left = operand == (1 if name == "baddbmm" else 0)
        return None if matrix.ndim < 2 else matrix if is_left else matrix.mT
    named, _, output = args[0].replace(" ", "").partition("->")
    mine, other = named.split(",")[operand], named.split(",")[1 - operand]
    keys = [index for index in mine if index in other and index not in output]
    queries = [index for index in mine if index not in other and index in output]
    if not len(keys) == len(queries) == 1:
        return None
    lead = "".join(index for index in output if index in mine and index not in queries)
    return torch.einsum(f"{mine}->{lead}{queries[0]}{keys[0]}", matrix)


def _eager_functions() -> Iterator[tuple[Any, Callable[..., Any]]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "modeling" in name and "eager_attention_forward" in vars(module):
            yield module, module.eager_attention_forward


def _brief(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    return value if isinstance(value, (bool, int, float, str)) else type(value).__name__


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in anything nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)


def _place() -> str:
    """The line of the model's own code that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/fuzz/" not in path:
            return f"{'/'.join(Path(path).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
