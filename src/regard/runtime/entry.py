"""Interceptors that are entered by ``with``: once, or by a context manager that may be entered again inside itself."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.nn import Module

from regard.runtime.chain import Block, Proceed
from regard.runtime.seams import entered
from regard.runtime.tracker import Site


class Entry:
    """An interceptor from its one entering to its leaving; its ``block`` tells what was seen in between."""

    edits = outermost = False
    block: Block

    def enter(self, model: Module | None) -> None:
        """Have the calls of a model go through it, or with None all."""
        with ExitStack() as entering:
            self.block = entering.enter_context(entered(self, model))
            self._exit = entering.pop_all()

    def leave(self) -> None:
        """Leave calls alone again."""
        self._exit.close()

    def check(self) -> None:
        """Refuse a block in which no attention call was seen."""
        self.block.check()

    def wants(self, site: Site) -> bool:
        """Every call, unless told otherwise."""
        return True

    def intercept(self, call: Any, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output."""
        raise NotImplementedError


_Entry = TypeVar("_Entry", bound=Entry)


class Reentrant(Generic[_Entry]):
    """A context manager that holds its settings only: what belongs to one entering of it is an entry of its own."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def _enter(self, entry: _Entry, model: Module | None) -> _Entry:
        entry.enter(model)
        self._entries.append(entry)
        return entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry = self._entries.pop()
        entry.leave()
        if kind is None:
            entry.check()
