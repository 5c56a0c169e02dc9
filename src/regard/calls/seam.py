"""The one place through which every attention call passes while somebody listens."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from regard.calls.call import AttentionCall
from regard.calls.interception import Interception, plain_attention
from regard.calls.multi_head import multi_head_attention
from regard.calls.run import edited_map, run
from regard.maps import AttentionMap, TokenMap


class Reading(Protocol):
    """What a listener does with one call: ask its questions, then take the answers."""

    @property
    def shares(self) -> bool:
        """Whether the model's output may come from the pass that answers the questions."""
        ...

    def ask(self, attention: TokenMap) -> None:
        """Announce questions, so that one pass over the matrix answers those of every listener."""
        ...

    def take(self, attention: TokenMap) -> None:
        """Read the answers."""
        ...


class Listener(Protocol):
    """Somebody who wants to know of attention calls."""

    def notice(self, call: AttentionCall, edited: AttentionCall | None) -> tuple[AttentionCall, Reading] | None:
        """The call in its normal form and what to read of it, or None for a call that is none of its business.

        ``edited`` is what runs in its place, if anything does.
        """
        ...


class Editor(Protocol):
    """Somebody who changes attention calls."""

    def edit(self, call: AttentionCall, edited: AttentionCall | None) -> AttentionCall | None:
        """What is to run, given the model's call and what editors before this one made of it; None to leave it at that."""
        ...

    def pass_by(self) -> None:
        """Take note of a call that is not to be changed, for it is shown: layers have the numbers that listeners count."""
        ...


class Kept(Protocol):
    """A call whose keys and values somebody keeps, who may have dropped some of those that the model believes to be there."""

    @property
    def dropped(self) -> bool:
        """Whether some are gone."""
        ...

    @property
    def call(self) -> AttentionCall:
        """The call in its normal form."""
        ...

    @property
    def reading(self) -> Reading | None:
        """What to read of it, on all keys."""
        ...

    def attend(self) -> Tensor:
        """The output over the keys that are left."""
        ...

    def restore(self) -> AttentionCall:
        """The same as a call on all keys, of which those that are gone are masked."""
        ...


class Keeper(Protocol):
    """Somebody who keeps keys and values."""

    def find(self, call: AttentionCall) -> Kept | None:
        """What is kept for this call, if anything."""
        ...


class _Local(threading.local):
    def __init__(self) -> None:
        self.keepers: list[Keeper] = []
        self.listeners: list[Listener] = []
        self.editors: list[Editor] = []
        self.busy = False  # with a call: what is computed for it is not looked at
        self.kept: list[AttentionCall] | None = None


_local = _Local()
_Member = TypeVar("_Member")


def listen(listener: Listener) -> AbstractContextManager[None]:
    """Show this thread's attention calls to the listener, until the block ends."""
    return _join(_local.listeners, listener)


def edit_calls(editor: Editor) -> AbstractContextManager[None]:
    """Have this thread's attention calls changed by the editor, until the block ends."""
    return _join(_local.editors, editor)


def keep(keeper: Keeper) -> AbstractContextManager[None]:
    """Let the keeper find this thread's attention calls that are his, until the block ends."""
    return _join(_local.keepers, keeper)


def watched() -> bool:
    """Whether a call made now in this thread would be looked at: what is made for `show` alone is made only then."""
    if torch.compiler.is_compiling() or _local.busy or _recomputing():
        return False
    return bool(_local.listeners or _local.editors)


def show(call: AttentionCall, read: Callable[[AttentionCall], TokenMap] = AttentionCall.map) -> None:
    """Show this thread's listeners a call whose output is computed by other means than PyTorch's attention.

    Args:
        call: four-dimensional, as it would be made.
        read: its matrix, from the call with its place in the model; asked only where a listener wants it.

    >>> import torch, regard
    >>> from regard.calls import show
    >>> class Mine(torch.nn.Module):
    ...     def forward(self, q, k, v):
    ...         show(regard.AttentionCall(q, k, v))
    ...         return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    >>> model = Mine()
    >>> with regard.watch(model, regard.Received()) as seen:
    ...     _ = model(*torch.randn(3, 1, 2, 5, 8))
    >>> seen.dataset().received.shape
    (1, 1, 2, 5)
    """
    if not watched():
        return
    for editor in _local.editors:
        editor.pass_by()
    noticed = [found for listener in _local.listeners if (found := listener.notice(call, None)) is not None]
    if not noticed:
        return
    with unseen(), _apart():
        attention = read(noticed[0][0])
        for _, reading in noticed:
            reading.ask(attention)
        for _, reading in noticed:
            reading.take(attention)


@contextmanager
def _apart() -> Iterator[None]:
    """Let what is read leave no trace in the model's graph; nor in what a checkpoint around it counts, if it has its own."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.no_grad(), hooks:
        yield


@contextmanager
def unseen() -> Iterator[None]:
    """Let this thread's calls run as they are, past everybody: they are parts of one that was shown, or read it."""
    before, _local.busy = _local.busy, True
    try:
        yield
    finally:
        _local.busy = before


@contextmanager
def _join(members: list[_Member], member: _Member) -> Iterator[None]:
    members.append(member)
    try:
        with _interception:
            yield
    finally:
        members.remove(member)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """What runs in place of PyTorch's attention, in every thread, while one of them listens."""
    if _local.busy or not (_local.listeners or _local.editors or _local.keepers):
        return plain_attention(*args, **kwargs)
    _local.busy = True
    try:
        return _find(AttentionCall(*args, **kwargs))
    finally:
        _local.busy = False


@contextmanager
def _keeping() -> Iterator[list[AttentionCall]]:
    """The calls that run in the block, as edited."""
    before, _local.kept = _local.kept, []
    try:
        yield _local.kept
    finally:
        _local.kept = before


_interception = Interception(_attention, functools.partial(multi_head_attention, _keeping))


def _find(call: AttentionCall) -> Tensor:
    """A call on the keys that it comes with, or on those that are kept for it."""
    kept = next((kept for keeper in _local.keepers if (kept := keeper.find(call)) is not None), None)
    if kept is None:
        return _attend(call, [])
    if not kept.dropped:
        return _attend(call, [(kept.call, kept.reading)] if kept.reading else [])
    if _local.editors or _local.listeners:
        restored = kept.restore()
        output = _attend(restored, [(restored, kept.reading)] if kept.reading else [])
    else:
        output = kept.attend()
    return output.reshape(*call.query.shape[:-1], output.shape[-1])


def _attend(call: AttentionCall, noticed: list[tuple[AttentionCall, Reading]]) -> Tensor:
    """Scaled dot-product attention, changed by the editors and read by whoever listens, and by who noticed it already."""
    recomputing = _recomputing()
    if recomputing and _local.editors:
        raise RuntimeError("attention cannot be steered under gradient checkpointing; disable it, or the edits' block")
    edited = _edit(call)
    if _local.kept is not None:
        _local.kept.append(call if edited is None else edited)
    if recomputing:
        return _run_plain(call)
    noticed += [found for listener in _local.listeners if (found := listener.notice(call, edited)) is not None]
    if edited is not None:
        return _run(call, edited, [reading for _, reading in noticed])
    if not noticed:
        return _run_plain(call)
    normal = noticed[0][0]
    readings = [reading for _, reading in noticed]
    shares = all(reading.shares for reading in readings) and _may_share(call, normal)
    with torch.no_grad():
        attention = normal.map()
        for reading in readings:
            reading.ask(attention)
        shared = _share(call, attention) if shares else None
    output = _run_plain(call) if shared is None else shared
    with torch.no_grad():
        for reading in readings:
            reading.take(attention)
    return output


def _run_plain(call: AttentionCall) -> Tensor:
    return plain_attention(
        call.query, call.key, call.value, call.attn_mask, call.dropout_p, call.is_causal,
        scale=call.scale, enable_gqa=call.enable_gqa,
    )  # fmt: skip


def _edit(call: AttentionCall) -> AttentionCall | None:
    """What the editors make of a call; None if they leave it alone."""
    edited: AttentionCall | None = None
    for editor in _local.editors:
        further = editor.edit(call, edited)
        edited = edited if further is None else further
    return edited


def _run(call: AttentionCall, edited: AttentionCall, readings: list[Reading]) -> Tensor:
    """The output of an edited call, in the form of the model's own, and what is to be read of its matrix."""
    if readings:
        with torch.no_grad():
            attention = edited_map(edited)
            for reading in readings:
                reading.ask(attention)
            for reading in readings:
                reading.take(attention)
    output = run(edited)
    return output.reshape(*call.query.shape[:-1], output.shape[-1]).to(call.value.dtype)


def _may_share(call: AttentionCall, normal: AttentionCall) -> bool:
    """Whether the model's own output may come from the pass that answers the questions."""
    tensors = (call.query, call.key, call.value, call.attn_mask)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    same_call = normal.query is call.query and normal.key is call.key
    return same_call and not (differentiable or call.dropout_p)


def _share(call: AttentionCall, attention: AttentionMap) -> Tensor | None:
    """That output, if it is the same to rounding."""
    if not attention.rides_along(call.value):
        return None
    attention.expect("product", call.value)
    return attention @ call.value


def _recomputing() -> bool:
    """Whether a checkpointed part of the forward pass runs again, inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
