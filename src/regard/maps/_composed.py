"""What maps that are composed of other maps have in common."""

from __future__ import annotations

from functools import reduce

import torch

from regard.maps.token_map import TokenMap


class Composed(TokenMap):
    """A map that answers from its parts."""

    def __init__(self, *parts: TokenMap) -> None:
        devices = {part.device for part in parts}
        if len(devices) > 1:
            raise ValueError(
                f"maps on {' and '.join(sorted(map(str, devices)))} do not compose; bring them to one device"
            )
        self.parts = parts

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics: the widest of its parts'."""
        return reduce(torch.promote_types, (part.dtype for part in self.parts))

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.parts[0].device

    @property
    def _numbers(self) -> int:
        return max(super()._numbers, *(part._numbers for part in self.parts))

    @property
    def _by_columns(self) -> bool:
        return all(part._by_columns for part in self.parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"
