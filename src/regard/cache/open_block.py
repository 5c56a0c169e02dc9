"""Whether a block of `regard.compress` is still open, as the layers of its caches know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OpenBlock:
    """Shared by a block and the layers that it made, copies of their caches included."""

    is_open: bool = True

    def __getstate__(self) -> dict[str, bool]:
        return {"is_open": False}

    def __deepcopy__(self, memo: object) -> OpenBlock:
        return self
