"""Names and numbers of tokens, turned into the columns that a product with the matrix takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Segment = int | slice | Sequence[int] | Tensor
Segments = Mapping[str, Segment]


# Beyond this many runs of neighbouring keys a product with columns of indicators beats as many sums.
_RUNS_AT_MOST = 16


def runs(segments: Segments, keys: int) -> tuple[tuple[slice, ...], ...] | None:
    """Each segment as a few runs of neighbouring keys; None where a batch's rows differ or the runs are many."""
    _check(segments)
    if any(isinstance(segment, Tensor) and segment.ndim == 2 for segment in segments.values()):
        return None
    found = tuple(_runs_of(positions(segment, keys, f"segment {name!r}", "keys")) for name, segment in segments.items())
    return found if sum(map(len, found)) <= _RUNS_AT_MOST else None


def _runs_of(chosen: Tensor) -> tuple[slice, ...]:
    first, last = int(chosen[0]), int(chosen[-1])
    if last - first + 1 == len(chosen) and bool((chosen.diff() == 1).all()):
        return (slice(first, last + 1),)
    chosen = torch.unique(chosen)
    begins = torch.cat([chosen.new_ones(1, dtype=torch.bool), chosen.diff() > 1])
    starts = chosen[begins].tolist()
    stops = chosen[torch.cat([begins[1:], begins.new_ones(1)])].tolist()
    return tuple(slice(start, stop + 1) for start, stop in zip(starts, stops, strict=True))


def indicator_columns(segments: Segments, keys: int, batch: int, device: torch.device) -> Tensor:
    """One column per segment, 1 at its keys: (B or 1, 1, M, S)."""
    _check(segments)
    columns = [_indicator(name, segment, keys, batch, device) for name, segment in segments.items()]
    rows = max(len(column) for column in columns)
    return torch.stack([column.expand(rows, keys) for column in columns], dim=-1).unsqueeze(1).float()


def _check(segments: Segments) -> None:
    if not isinstance(segments, Mapping) or not segments:
        raise ValueError(f'segments must be a mapping from names to keys, such as {{"sink": [0]}}, got {segments!r}')


def _indicator(name: str, segment: Segment, keys: int, batch: int, device: torch.device) -> Tensor:
    """(B or 1, M) boolean."""
    if isinstance(segment, Tensor) and segment.dtype == torch.bool:
        if segment.shape not in ((keys,), (1, keys), (batch, keys)):
            raise ValueError(
                f"segment {name!r} is a mask of shape {tuple(segment.shape)}; expected ({keys},) or ({batch}, {keys})"
            )
        return segment.to(device).reshape(-1, keys)
    column = torch.zeros(1, keys, dtype=torch.bool, device=device)
    column[:, positions(segment, keys, f"segment {name!r}", "keys").to(device)] = True
    return column


def positions(index: Segment, length: int, what: str, unit: str) -> Tensor:
    """An index, a slice or several indices as a tensor of positions; negative ones count from the end."""
    if isinstance(index, slice):
        chosen = torch.arange(length)[index]
        if index.stop is not None and not -length <= index.stop <= length:
            raise IndexError(f"{what} ends at {index.stop}, but there are {length} {unit}")
    elif isinstance(index, Tensor) and index.dtype == torch.bool:
        if index.shape != (length,):
            raise IndexError(f"{what} is a mask of shape {tuple(index.shape)}, but there are {length} {unit}")
        chosen = index.nonzero().squeeze(-1)
    else:
        chosen = torch.as_tensor(index)
        if chosen.numel() and (chosen.is_floating_point() or chosen.is_complex()):
            raise TypeError(f"{what} must be positions, a slice or a boolean mask, got {index!r}")
        chosen = chosen.long().reshape(-1)
    beyond = chosen[(chosen < -length) | (chosen >= length)]
    if len(beyond):
        raise IndexError(f"{what} names position {int(beyond[0])}, but there are {length} {unit}")
    if not len(chosen):
        raise IndexError(f"{what} is empty: {index!r} of {length} {unit}")
    return torch.where(chosen < 0, chosen + length, chosen)
