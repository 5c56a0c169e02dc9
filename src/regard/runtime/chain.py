"""The chain that every call goes through: blocks nest in the order in which they were entered, as middleware does.

A block belongs to where it was entered: to that thread or asyncio task, and to the threads and tasks begun in it, such as
one that runs ``generate`` for a streamer. Others are never touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import unseen_model
from regard.runtime.call import AttentionCall, HiddenCall, Place, normalize, output_shape
from regard.runtime.stack import Stack
from regard.runtime.tracker import Site, Tracker, is_over_channels
from regard.tokens import Selection

Proceed = Callable[[Any], Tensor]


class Interceptor(Protocol):
    """Somebody who sees calls, changes them, or makes them himself."""

    @property
    def edits(self) -> bool:
        """Whether outputs may change; reading may be left out where a call is only made again, and editing may not."""
        ...

    @property
    def outermost(self) -> bool:
        """Whether it goes before all others, as who gives a call its keys must."""
        ...

    def wants(self, site: Site) -> bool:
        """Whether a call made there is to be intercepted."""
        ...

    def intercept(self, call: Any, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output: what ``proceed`` returns for it, or for another call in its place.

        ``call`` is an `AttentionCall`, or the `HiddenCall` of a mixer. ``alone`` tells that nobody comes after.
        """
        ...


class Block:
    """An interceptor while it is entered. Who enters it holds it: one that is lost to an interrupt is closed."""

    def __init__(self, interceptor: Interceptor, model: Module | None) -> None:
        model = getattr(model, "_orig_mod", model)  # inside what torch.compile returns, whose generate passes it by
        self.interceptor = interceptor
        self.tracker: Tracker = _shared_tracker(model) or Tracker(model)
        self.first_pass = self.tracker.passes
        self.seen: dict[int, str] = {}  # paths of the calls that the model made, by number
        self.mixers: set[int] = set()  # numbers of those that have no queries and keys
        self.softmaxes: dict[tuple[Module, str], None] = {}  # taken, and in no product with values: module and line
        self.is_open = False

    def open(self) -> None:
        """Have the calls made from here on intercepted."""
        reference = ref(self, _forget)
        around = tuple(ref(block) for block in _here_open())
        self.is_open = True
        _everywhere.append(reference)
        _here.set((*around, reference))

    def close(self) -> None:
        """Leave calls alone again."""
        self.is_open = False
        _here.set(tuple(ref(block) for block in _here_open()))
        for reference in list(_everywhere):
            if reference() is self:
                _forget(reference)

    @property
    def passes(self) -> int:
        """How many passes the model has made in it."""
        return self.tracker.passes - self.first_pass

    def layers(self, selection: Selection) -> int | None:
        """How many calls a pass of the model makes, where the selection counts from the last."""
        return self.tracker.count_layers() if selection.counts_layers else None

    def chooses(self, selection: Selection, site: Site) -> bool:
        """Whether a call made there is of a chosen layer and pass."""
        return selection.wants_pass(site.pass_index) and selection.wants(site.path, site.layer, self.layers(selection))

    def check(self) -> None:
        """Refuse a block in which no call was seen, with what to do about it; say what else was not seen."""
        model = self.tracker.model
        softmaxes = unseen_model.name_softmaxes(model, self.softmaxes)
        if not self.seen:
            raise RuntimeError(unseen_model.explain(model, softmaxes))
        unseen_model.warn(model, self.seen.values(), softmaxes)


_here: ContextVar[tuple[ReferenceType[Block], ...]] = ContextVar("regard", default=())
_everywhere: list[ReferenceType[Block]] = []
PLAIN_START = threading.Thread.start
"""Python's own ``Thread.start``."""


class _Calls(list[AttentionCall]):
    """A list that can be referred to weakly."""


class _Local(threading.local):
    """What a thread is at. Weak: what an interrupt kept from being put back ends with the frame that holds it."""

    unseen: ReferenceType[_Calls] | None = None
    finished: ReferenceType[_Calls] | None = None


_local = _Local()


def _shared_tracker(model: Module | None) -> Tracker | None:
    """That of the blocks around on the same model."""
    return next((block.tracker for block in _here_open() if block.tracker.model is model), None)


def _forget(reference: ReferenceType[Block]) -> None:
    if reference in _everywhere:
        _everywhere.remove(reference)


def _here_open() -> list[Block]:
    """The blocks that calls made here go through."""
    references: Iterable[ReferenceType[Block]] = _here.get()
    if not references and recomputing() and isinstance(threading.current_thread(), threading._DummyThread):
        references = list(_everywhere)  # a thread of autograd's own, which recomputes for who knows whom
    return [block for reference in references if (block := reference()) is not None and block.is_open]


def start(thread: threading.Thread) -> None:
    """``threading.Thread.start``, for a thread that goes on in the blocks of the one that begins it."""
    here = _here.get()
    run = thread.run

    def run_here() -> None:
        _here.set(here)
        run()

    if here:
        thread.run = run_here  # type: ignore[method-assign]
    PLAIN_START(thread)


def _busy() -> bool:
    """Whether this thread is with a call: what is computed for it is not looked at."""
    return _local.unseen is not None and _local.unseen() is not None


@contextmanager
def unseen() -> Iterator[None]:
    """Let this thread's calls run as they are, past everybody: they are parts of one that was seen, or read it."""
    before, held = _local.unseen, _Calls()
    try:
        _local.unseen = ref(held)
        yield
    finally:
        _local.unseen = before


@contextmanager
def finished() -> Iterator[list[AttentionCall]]:
    """The calls that this thread makes in the block, as they are at the end of their chains."""
    before, calls = _local.finished, _Calls()
    try:
        _local.finished = ref(calls)
        yield calls
    finally:
        _local.finished = before


def note_softmax(module: Module, line: str) -> None:
    """A module takes a softmax, which is not known to be one over keys before it enters a product with values."""
    for block in _here_open():
        block.softmaxes[module, line] = None


def note_part(module: Module, line: str) -> None:
    """One over keys enters several products, each with some of its keys: who sees one of them has not seen the matrix."""
    forget_softmax(module, line)
    note_softmax(module, f"{line}, {unseen_model.IN_PARTS}")


def forget_softmax(module: Module, line: str) -> None:
    """It has entered one."""
    for block in _here_open():
        block.softmaxes.pop((module, line), None)


def some_open() -> bool:
    """Whether any block is open, be it elsewhere."""
    return bool(_everywhere)


def looked_at() -> bool:
    """Whether a call made now goes through any block: what is made for `intercept` alone is made only then."""
    return bool(_everywhere) and not (_busy() or torch.compiler.is_compiling() or recomputing()) and bool(_here_open())


def edited(module: Module | None = None) -> bool:
    """Whether a block here may change what is computed: what runs, with ``module`` as its innermost, is of its model."""
    blocks = [block for block in _here_open() if block.interceptor.edits] if looked_at() else []
    if not blocks:
        return False
    stack, parts = Stack(module), set() if module is None else set(module.modules())
    trackers = [block.tracker for block in blocks]
    return any(tracker.model in parts or tracker.frames(stack) is not None for tracker in trackers)


def interceptors() -> list[Interceptor]:
    """Those whose blocks are open here."""
    return [block.interceptor for block in _here_open()]


def recomputing() -> bool:
    """Whether a checkpointed part of the forward pass runs again, inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def intercept(call: Any, finish: Callable[[Any, Any], Tensor], *, label: str = "", past: int | None = None) -> Tensor:
    """The output of a call that is made here, by whatever the open blocks make of it.

    Args:
        call: an `AttentionCall` as its maker made it, or a `HiddenCall`.
        finish: the output of a call at the end of the chain, from it and from the call in its normal form as it went in.
        label: for the call's path, beside that of the module that runs.
        past: the number of tokens before the call's own, where its maker knows.
    """
    blocks = [] if _busy() or torch.compiler.is_compiling() else _here_open()
    links: list[Link] = []
    if blocks:
        stack = Stack()
        if isinstance(call, AttentionCall) and stack.frames and is_over_channels(call, stack.frames[0]):
            label += ".channels"
        links = _links(blocks, stack, label, isinstance(call, HiddenCall))
    if not links or _is_empty(call):
        return _finish(call, call, finish)
    output = _pass(links, call, finish, past)
    if isinstance(call, HiddenCall) or output.shape[:-1] == call.query.shape[:-1]:
        return output
    return output.reshape(*output_shape(call)[:-1], output.shape[-1])


def read_beside(make: Callable[[], AttentionCall], finish: Callable[[Any, Any], Tensor], maker: Module | None) -> None:
    """Have a call be read that was answered past the chain.

    Args:
        make: the call, asked for only where some block wants it.
        finish: as for `intercept`.
        maker: the module that would have made it, where it is not the one that runs.
    """
    links = _links(_here_open(), Stack(maker), "", False)
    call = make() if links else None
    if call is not None and not _is_empty(call):
        _pass(links, call, finish, None)


Link = tuple[Block, Site]


def _pass(links: list[Link], call: Any, finish: Callable[[Any, Any], Tensor], past: int | None) -> Tensor:
    """The output of a call that these blocks want, in its normal form."""
    normal = normalize(call, *links[0][1].maker) if isinstance(call, AttentionCall) else call
    with unseen():
        return _Passage(links, lambda last: _finish(last, normal, finish), past).enter(normal)


def _is_empty(call: AttentionCall | HiddenCall) -> bool:
    """Whether there is nothing in it to be read or changed."""
    return isinstance(call, AttentionCall) and not (call.query.numel() and call.key.numel() and call.value.numel())


def _finish(last: Any, normal: Any, finish: Callable[[Any, Any], Tensor]) -> Tensor:
    calls = None if _local.finished is None else _local.finished()
    if calls is not None:
        calls.append(last)
    return finish(last, normal)


def _links(blocks: list[Block], stack: Stack, label: str, hidden: bool) -> list[Link]:
    """The blocks that want the call, each with where it stands there; who gives a call its keys goes first."""
    if recomputing():
        _refuse_edits(blocks, stack)
        return []
    sites: dict[int, Site | None] = {}
    links: list[Link] = []
    for block in blocks:
        tracker = block.tracker
        if id(tracker) not in sites:
            sites[id(tracker)] = tracker.find(stack, label)
        site = sites[id(tracker)]
        if site is None:
            continue
        block.seen[site.layer] = site.path
        if hidden:
            block.mixers.add(site.layer)
        if block.first_pass:
            site = site._replace(pass_index=site.pass_index - block.first_pass)
        if block.interceptor.wants(site):
            links.append((block, site))
    return sorted(links, key=lambda link: not link[0].interceptor.outermost)


class _Passage:
    """One call on its way through the blocks."""

    def __init__(self, links: list[Link], finish: Proceed, past: int | None) -> None:
        self._links = links
        self._finish = finish
        self._past = past
        self._places: dict[int, Place] = {}
        self._keepers = sum(block.interceptor.outermost for block, _ in links)

    def enter(self, call: Any) -> Tensor:
        return self._proceed(0, call)

    def _proceed(self, number: int, call: Any) -> Tensor:
        if number == len(self._links):
            return self._finish(call)
        block, site = self._links[number]
        if number >= self._keepers and not self._places:
            self._find_places(call)
        place = self._places.get(number) or _place_of(site)
        alone = number + 1 == len(self._links)
        return block.interceptor.intercept(call.at(place), lambda further: self._proceed(number + 1, further), alone)

    def _find_places(self, call: Any) -> None:
        """Where the call stands for everybody, before any of them changes its keys."""
        found: dict[int, Place] = {}
        for number, (block, site) in enumerate(self._links[self._keepers :], start=self._keepers):
            tracker = block.tracker
            if id(tracker) not in found:
                queries = call.queries if isinstance(call, HiddenCall) else call.query.shape[2]
                found[id(tracker)] = tracker.place(site, call.value, queries, self._past)
            place = found[id(tracker)]
            mask = call.place.token_mask  # where the model itself tells its padding
            same = place.pass_index == site.pass_index and mask is None
            self._places[number] = place if same else replace(place, pass_index=site.pass_index, token_mask=mask)


def _place_of(site: Site) -> Place:
    """As far as it is known before the call has its keys."""
    cache, cache_layer = site.cache
    return Place(
        site.path, site.layer, site.pass_index, cache=cache, cache_layer=cache_layer,
        frames=tuple(site.frames), token_ids=site.token_ids, memo=site.running.memo,
    )  # fmt: skip


def _refuse_edits(blocks: list[Block], stack: Stack) -> None:
    """A part of a model that runs again without the rest has lost where its calls stand."""
    for block in blocks:
        if block.interceptor.edits and block.tracker.frames(stack) is not None:
            raise RuntimeError(
                "attention cannot be steered or compressed under gradient checkpointing; disable it, or leave the block"
            )
