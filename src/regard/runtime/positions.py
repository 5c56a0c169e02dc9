"""Selections of absolute positions, resolved for the part of a text that one call sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Positions = int | slice | Sequence[int] | Tensor
Where = Positions | Callable[[Tensor], Tensor] | str


def selected(positions: Positions | None, start: int, length: int) -> Tensor:
    """(length,) boolean: which of the tokens start … start + length − 1 the positions name; (batch, length) from such a mask.

    Negative positions count from the end of the text as far as it is known at this call.
    """
    end = start + length
    if positions is None:
        return torch.ones(length, dtype=torch.bool)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        known = positions[..., :end].cpu()
        return torch.nn.functional.pad(known, (0, end - known.shape[-1]))[..., start:]
    whole = torch.zeros(end, dtype=torch.bool)
    if isinstance(positions, slice):
        chosen = range(end)[positions]
        chosen = chosen if chosen.step > 0 else chosen[::-1]
        whole[chosen.start : chosen.stop : chosen.step] = True
    else:
        index = positions.reshape(-1).tolist() if isinstance(positions, Tensor) else positions
        for position in [index] if isinstance(index, int) else index:
            if -end <= position < end:
                whole[position] = True
    return whole[start:]
