"""What policies are made of, printed as one writes it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor


class Part:
    """A frozen dataclass that is printed as one writes it: what it must be given, and what is not as by default."""

    def __str__(self) -> str:
        """Its name and arguments."""
        whole: Any = self
        parts = []
        for field in fields(whole):
            value = getattr(self, field.name)
            if field.default is MISSING and not field.kw_only:
                parts.append(_written(value))
            elif value is not field.default and value != field.default:
                parts.append(f"{field.name}={_written(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _written(value: object) -> str:
    """A value as one would write it, or what there is of numbers."""
    if isinstance(value, Tensor):
        return f"<{tuple(value.shape)}>"
    return str(value) if isinstance(value, Part) else repr(value)
