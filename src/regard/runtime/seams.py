"""Where calls are found: PyTorch's functions of attention, replaced such that who is not looked at is left alone.

``scaled_dot_product_attention`` is replaced in PyTorch's dispatcher, below every name that it was imported under, once for
the process: to register kernels and take them away again under calls of other threads crashes PyTorch. While some block
is open, what would go around it is led back: the kernels that a `CausalBias` picks by itself, ``need_weights=True`` of
`nn.MultiheadAttention`, compiled code, and threads that begin there; the eager attention of the model's own files goes
through the chain too, and the fast path of PyTorch's transformer layers is read beside it, or closed where it is edited.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, functional

from regard.runtime import attention, beams, chain, eager, fast_path, multi_head, softmax
from regard.runtime.call import AttentionCall
from regard.runtime.chain import Block, Interceptor

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

_KERNELS = ("CompositeExplicitAutograd", "Autograd")  # every device, without and with gradients
_MULTI_HEAD = "multi_head_attention_forward"
_plain_compile: Callable[..., Any] = torch.compile
_lock = threading.RLock()
_library: list[Any] = []
_put_back: list[Callable[[], object]] = []  # the steps that undo, in the order of what they undo
_led_back = False


@contextmanager
def entered(interceptor: Interceptor, model: Module | None) -> Iterator[Block]:
    """Have the interceptor see the calls of a model, or with None all, until the block ends."""
    block = Block(interceptor, model)
    try:
        block.open()
        _arrange()
        _lead_eager(model)
        yield block
    finally:
        try:
            _surely(block.close)
        finally:
            softmax.release()
            try:
                _surely(_arrange)
            finally:
                _surely(_let_go)


def _surely(step: Callable[[], None]) -> None:
    """Run a step that may be run twice to its end, also where an interrupt comes into it."""
    try:
        step()
    except BaseException:
        step()
        raise


def _let_go() -> None:
    """Give the lock back as often as this thread has it: an interrupt may have come just before it was to be released."""
    with suppress(RuntimeError):  # which tells that this thread has it no more
        while True:
            _lock.release()


def _arrange() -> None:
    """Lead calls to the chain while some block is open, and put everything back when none is."""
    global _led_back
    with _lock:
        if chain.some_open():
            _register()
            beams.install()
            if not _led_back:
                _lead_back()
                _led_back = True
        else:
            for undo in reversed(_put_back):
                undo()
            _led_back = False
            _put_back.clear()


def _lead_eager(model: Module | None) -> None:
    """Have the eager attention of a model's files go through the chain too; those that do already are not taken twice."""
    with _lock:
        for holder in eager.holders(model):
            function = eager.wrapper(vars(holder)[eager.NAME])
            if function is not None:
                _replace(holder, eager.NAME, function)


def _register() -> None:
    if _library:
        return
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    for kernel in _KERNELS:
        library.impl("scaled_dot_product_attention", _attention, kernel)
        library.impl("softmax.int", softmax.kernel, kernel)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """What runs in place of PyTorch's attention, in every thread."""
    if not chain.some_open():
        if _put_back:  # a block was lost to an interrupt
            _arrange()
        return attention.plain(*args, **kwargs)
    make = functools.partial(attention.plain, *args, **kwargs)
    return chain.intercept(AttentionCall.of(*args, **kwargs), functools.partial(attention.attend, make))


def _lead_back() -> None:
    _replace(torch.backends.mha, "get_fastpath_enabled", fast_path.enabled)
    _replace(torch, "_native_multi_head_attention", fast_path.multi_head)
    _replace(torch, "_transformer_encoder_layer_fwd", fast_path.encoder_layer)
    _replace(threading.Thread, "start", chain.start)
    for owner in _holders():
        _replace(owner, _MULTI_HEAD, multi_head.forward)
    bias = sys.modules.get("torch.nn.attention.bias")
    if bias is not None:
        _replace(bias.CausalBias, "_dispatch", staticmethod(_with_plain_mask))
    if "torch._dynamo" in sys.modules:
        _run_uncompiled()
    else:  # nothing was compiled yet
        _replace(torch, "compile", _compile)


def _run_uncompiled() -> None:
    stances: list[Any] = []

    def put_back() -> None:
        for stance in stances:
            stance.__exit__(None, None, None)

    _put_back.append(put_back)  # before there is anything to put back, so that no interrupt comes in between
    stances.append(torch.compiler.set_stance("force_eager"))


def _compile(*args: Any, **kwargs: Any) -> Any:
    """``torch.compile`` in the block in which it is called for the first time, where there is a compiler only then."""
    compiled = _plain_compile(*args, **kwargs)
    with _lock:
        if vars(torch)["compile"] is _compile:
            _replace(torch, "compile", _plain_compile)
            _run_uncompiled()
    return compiled


@functools.lru_cache(maxsize=1)
def _holders_among(number: int) -> list[Any]:
    functions = (multi_head.PLAIN, multi_head.forward)
    every = list(sys.modules.values())
    return [module for module in every if getattr(module, "__dict__", {}).get(_MULTI_HEAD) in functions]


def _holders() -> list[Any]:
    """The modules that have PyTorch's function by its name."""
    return _holders_among(len(sys.modules))


def _replace(owner: Any, name: str, function: Any) -> None:
    _put_back.append(functools.partial(setattr, owner, name, vars(owner)[name]))
    setattr(owner, name, function)


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
