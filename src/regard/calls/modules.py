"""Which module is running: the stack that a model's forward hooks keep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch.nn import Module, MultiheadAttention
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

_BARE = "scaled_dot_product_attention"
_NEVER_ATTENDS = ("Norm", "Embedding", "MLP")


class ModuleStack:
    """Follows a model, or with ``None`` every module of the process, from entry to exit.

    A *pass* begins when a module is entered while none is running: a call of the model, one step of ``generate``.
    ``arguments`` are the keyword arguments of that outermost call and ``positional`` the others; ``begin`` is called with
    this stack before it runs. Calls from other threads than the one that entered the stack are not followed.
    """

    def __init__(self, model: Module | None, begin: Callable[[ModuleStack], None] = lambda stack: None) -> None:
        self.model = model
        self._begin = begin
        self.pass_index = -1
        self.arguments: Mapping[str, Any] = {}
        self.positional: tuple[Any, ...] = ()
        self._names: dict[Module, str] = {}
        self._running: list[Module] = []
        self._seen_in_pass: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._thread = 0

    def __enter__(self) -> ModuleStack:
        self._thread = threading.get_ident()
        if self.model is None:
            self._handles = [
                register_module_forward_pre_hook(lambda module, args: self._enter(module, args, {})),
                register_module_forward_hook(self._leave, always_call=True),
            ]
            return self
        self._names = {module: _without_wrappers(name) for name, module in self.model.named_modules()}
        for module in self._names:
            if module is not self.model and not _may_attend(module):
                continue
            self._handles += [
                module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    @property
    def module(self) -> Module | None:
        """The innermost module that is running."""
        return self._running[-1] if self._running else None

    @property
    def active(self) -> bool:
        """Whether a call made now is one to look at."""
        return threading.get_ident() == self._thread and (self.model is None or bool(self._running))

    def next_label(self) -> str:
        """The running module's path; ``path#1`` for its second call within a pass, and so on."""
        path = self._path()
        number = self._seen_in_pass.get(path, 0)
        self._seen_in_pass[path] = number + 1
        return f"{path}#{number}" if number else path

    def _path(self) -> str:
        if not self._running:
            return _BARE
        if self.model is not None:
            return self._names[self._running[-1]] or type(self.model).__name__
        path = type(self._running[0]).__name__
        for parent, child in zip(self._running, self._running[1:], strict=False):
            name = next((name for name, module in parent.named_modules() if module is child), type(child).__name__)
            path += f".{name}"
        return path

    def _enter(self, module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        if not self._running:
            self.pass_index += 1
            self.positional, self.arguments = args, kwargs
            self._seen_in_pass.clear()
            self._begin(self)
        self._running.append(module)

    def _leave(self, module: Module, args: object, output: object) -> None:
        if threading.get_ident() == self._thread and self._running and self._running[-1] is module:
            self._running.pop()


def _may_attend(module: Module) -> bool:
    """Whether a call could be made in this module itself. The hooks of others, such as norms, would only cost time."""
    if type(module).__name__.endswith(_NEVER_ATTENDS):
        return False
    own_layer = type(module).__module__.startswith("torch.nn.modules.") and not any(module.children())
    return not own_layer or isinstance(module, MultiheadAttention)


def _without_wrappers(path: str) -> str:
    """torch.compile's wrapper is no part of the model's own paths."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
