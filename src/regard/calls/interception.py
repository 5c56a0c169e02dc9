"""How the seam gets between a model and PyTorch's attention, and out again.

``scaled_dot_product_attention`` is replaced in PyTorch's dispatcher, below every name that it was imported under, so that no
other function's call costs anything. What would go around it is led back: the fast path of PyTorch's transformer layers, the
kernels that a `CausalBias` picks by itself, and ``need_weights=True`` of `nn.MultiheadAttention`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from regard.calls.enter import enter_all

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

_KERNELS = ("CompositeExplicitAutograd", "Autograd")  # every device, without and with gradients
_MULTI_HEAD = "multi_head_attention_forward"

Function = Callable[..., Any]


plain_attention: Callable[..., Tensor] = functools.partial(
    torch.ops.aten.scaled_dot_product_attention.default._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd
)
"""PyTorch's own ``scaled_dot_product_attention``, past any interception."""


class Interception:
    """While it is entered, by any number of threads, ``attention`` and ``multi_head`` run in place of PyTorch's functions."""

    def __init__(self, attention: Function, multi_head: Function) -> None:
        self._attention = attention
        self._multi_head = multi_head
        self._lock = threading.Lock()
        self._entered = 0
        self._exit = ExitStack()

    def __enter__(self) -> None:
        from torch.nn.attention.bias import CausalBias  # only here, for it takes all of torch.compile along

        with self._lock:
            if not self._entered:
                self._exit = enter_all(
                    _registered(self._attention),
                    _without_fast_path(),
                    _replaced([CausalBias], "_dispatch", staticmethod(_with_plain_mask)),
                    _replaced(_holders(_MULTI_HEAD), _MULTI_HEAD, self._multi_head),
                )
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self._exit.close()


@contextmanager
def _registered(attention: Function) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        for kernel in _KERNELS:
            library.impl("scaled_dot_product_attention", attention, kernel)
        yield
    finally:
        library._destroy()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _with_plain_mask(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: CausalBias, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The call with the mask or the flag that the `CausalBias` stands for."""
    from torch.nn.attention.bias import CausalVariant

    triangle, queries, keys = None, attn_mask.seq_len_q, attn_mask.seq_len_kv
    if attn_mask.variant == CausalVariant.LOWER_RIGHT and queries != keys:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return functional.scaled_dot_product_attention(
        query, key, value, triangle, dropout_p, triangle is None, scale=scale, enable_gqa=enable_gqa
    )


def _holders(name: str) -> list[Any]:
    """The modules that have PyTorch's function by its name."""
    function = getattr(functional, name)
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is function]


@contextmanager
def _replaced(owners: list[Any], name: str, function: Any) -> Iterator[None]:
    before = [vars(owner)[name] for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, function)
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            setattr(owner, name, own)
