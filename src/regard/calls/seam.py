"""The one place through which every attention call passes while somebody listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from regard.calls.call import AttentionCall
from regard.calls.multi_head import multi_head_attention
from regard.maps import AttentionMap

Attend = Callable[..., Tensor]


class Reading(Protocol):
    """What a listener does with one call: ask its questions, then take the answers."""

    @property
    def shares(self) -> bool:
        """Whether the model's output may come from the pass that answers the questions."""
        ...

    def ask(self, attention: AttentionMap) -> None:
        """Announce questions, so that one pass over the matrix answers those of every listener."""
        ...

    def take(self, attention: AttentionMap) -> None:
        """Read the answers."""
        ...


class Listener(Protocol):
    """Somebody who wants to know of attention calls."""

    def notice(self, call: AttentionCall) -> tuple[AttentionCall, Reading] | None:
        """The call in its normal form and what to read of it, or None for a call that is none of its business."""
        ...


class _Local(threading.local):
    def __init__(self) -> None:
        self.listeners: list[Listener] = []


_local = _Local()


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Show this thread's attention calls to the listener, until the block ends."""
    _local.listeners.append(listener)
    try:
        if len(_local.listeners) == 1:
            with _Seam():
                yield
        else:
            yield
    finally:
        _local.listeners.remove(listener)


class _Seam(TorchFunctionMode):
    """Sees each PyTorch function that is called, whatever name it was imported under."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if function is functional.multi_head_attention_forward:
            return multi_head_attention(attend, *args, **kwargs)
        return function(*args, **kwargs)


def attend(*args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention, read by whoever listens."""
    original = functional.scaled_dot_product_attention
    if _recomputing():
        return original(*args, **kwargs)
    call = _bind(*args, **kwargs)
    noticed = [found for found in (listener.notice(call) for listener in _local.listeners) if found is not None]
    if not noticed:
        return original(*args, **kwargs)
    normal = noticed[0][0]
    readings = [reading for _, reading in noticed]
    shares = all(reading.shares for reading in readings) and _may_share(call, normal)
    with torch.no_grad():
        attention = normal.map()
        for reading in readings:
            reading.ask(attention)
        shared = _share(call, attention) if shares else None
    output = original(*args, **kwargs) if shared is None else shared
    with torch.no_grad():
        for reading in readings:
            reading.take(attention)
    return output


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    return AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _may_share(call: AttentionCall, normal: AttentionCall) -> bool:
    """Whether the model's own output may come from the pass that answers the questions."""
    tensors = (call.query, call.key, call.value, call.attn_mask)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    autocast = torch.is_autocast_enabled(call.query.device.type)
    same_call = normal.query is call.query and normal.key is call.key
    return same_call and not (differentiable or autocast or call.dropout_p)


def _share(call: AttentionCall, attention: AttentionMap) -> Tensor | None:
    """That output, if it is the same to rounding."""
    if not attention.rides_along(call.value):
        return None
    attention.expect("product", call.value)
    return attention @ call.value


def _recomputing() -> bool:
    """Whether a checkpointed part of the forward pass runs again, inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
