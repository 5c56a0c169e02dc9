"""Packages that are called by their own name, as in ``regard.watch(model, …)`` beside ``regard.watch.Entropy``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """A package and what it is for, under one name: a function of that name would hide the package."""

    _called: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)


def make_callable(package: str, called: Callable[..., Any]) -> None:
    """Have calls of the package go to this."""
    module: Any = sys.modules[package]
    module.__class__ = _CallablePackage
    module._called = called
    module.__wrapped__ = called  # whose signature is shown
