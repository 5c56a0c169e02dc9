"""What `regard.mini` is to a type checker: a package that is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import Module


class CalledPackage(Protocol):
    """The bundled model by a call, its folder by ``path``."""

    name: str

    def __call__(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Module, Any]: ...

    def path(self) -> Path: ...


mini: CalledPackage
