"""Which modules are running: read from Python's own stack where a call is made, so that nothing is hung on a model.

There are no hooks to be left behind by an interrupt or copied with a model, each thread has its own stack, and a model that
nobody looks at runs as it always does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn import Module

_CALL = Module._call_impl.__code__
_TORCH = str(Path(torch.__file__).parent)


@dataclass(slots=True, eq=False)
class Frame:
    """A module that runs, and what it was called with. ``run`` is an object of this one run of it."""

    module: Module
    positional: tuple[Any, ...]
    arguments: Mapping[str, Any]
    run: object


class Stack:
    """The modules that run the function that makes it, innermost first; ``inner`` is as if called by the one that runs."""

    def __init__(self, inner: Module | None = None) -> None:
        # Its maker's own frame would hold it in turn, and with it all that the model holds here, until garbage is collected.
        self._start = sys._getframe(1).f_back
        self._inner = [] if inner is None else [Frame(inner, (), {}, object())]
        self.frames = [*self._inner, *_called(self._start)]
        self._direct: list[Frame] | None = None

    def above(self, model: Module) -> list[Frame] | None:
        """The frames from the innermost to the model's own outermost; None where it does not run."""
        return _up_to(model, self.frames) or _up_to(model, self.direct)

    @property
    def direct(self) -> list[Frame]:
        """The frames with those of a ``forward`` that was called by itself."""
        if self._direct is None:
            self._direct = [*self._inner, *_forwarded(self._start)]
        return self._direct


def caller() -> tuple[Module | None, str]:
    """The innermost module that runs, and the line of its own code, or of what it calls, that is run."""
    frame: FrameType | None = sys._getframe(2)
    line = ""
    while frame is not None:
        if frame.f_code is _CALL:
            return frame.f_locals["self"], line
        if not line and not frame.f_code.co_filename.startswith(_TORCH):
            line = f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return None, line


def _up_to(model: Module, frames: list[Frame]) -> list[Frame] | None:
    for number in range(len(frames) - 1, -1, -1):
        if frames[number].module is model:
            return frames[: number + 1]
    return None


def _called(frame: Any) -> Iterator[Frame]:
    """Modules by their ``__call__``."""
    while frame is not None:
        if frame.f_code is _CALL:
            named = frame.f_locals
            yield Frame(named["self"], named["args"], named["kwargs"], named["kwargs"])
        frame = frame.f_back


def _is_direct(frame: Any) -> bool:
    """Whether a frame is that of a ``forward`` of which it is not known yet that it was called as a module is."""
    code = frame.f_code
    if code.co_name != "forward" or not code.co_argcount or code.co_varnames[0] != "self":
        return False
    return frame.f_back is None or frame.f_back.f_code is not _CALL


def _forwarded(frame: Any) -> Iterator[Frame]:
    """Modules by their ``__call__`` or, where that was passed by, their ``forward``."""
    inner: Frame | None = None
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            named = frame.f_locals
            called = Frame(named["self"], named["args"], named["kwargs"], named["kwargs"])
            if inner is not None and inner.module is not called.module:
                yield inner
            inner = None
            yield called
        elif _is_direct(frame):
            named = frame.f_locals
            if isinstance(named.get("self"), Module) and (inner is None or inner.module is not named["self"]):
                if inner is not None:
                    yield inner
                inner = Frame(named["self"], (), named, frame)
        frame = frame.f_back
    if inner is not None:
        yield inner
