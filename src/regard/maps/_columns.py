"""Names and numbers of tokens, turned into the columns that a product with the matrix takes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from regard.tokens import Positions, among, indices

Segment = Positions
Segments = Mapping[str, Segment]


# Beyond this many runs of neighbouring keys a product with columns of indicators beats as many sums.
_RUNS_AT_MOST = 16


class KeySets(dict[str, Segment]):
    """Segments that many maps are asked for: what they come down to is found once."""

    def __init__(self, segments: Segments) -> None:
        super().__init__(segments)
        self.found: dict[int, tuple[tuple[slice, ...], ...] | None] = {}


def runs(segments: Segments, keys: int) -> tuple[tuple[slice, ...], ...] | None:
    """Each segment as a few runs of neighbouring keys; None where a batch's rows differ or the runs are many."""
    if not isinstance(segments, KeySets):
        return _find_runs(segments, keys)
    if keys not in segments.found:
        segments.found[keys] = _find_runs(segments, keys)
    return segments.found[keys]


def _find_runs(segments: Segments, keys: int) -> tuple[tuple[slice, ...], ...] | None:
    _check(segments)
    masks = [among(segment, keys, f"segment {name!r}", unit="keys") for name, segment in segments.items()]
    if any(len(mask) > 1 for mask in masks):
        return None
    found = tuple(_runs_of(mask[0]) for mask in masks)
    return found if sum(map(len, found)) <= _RUNS_AT_MOST else None


def _runs_of(mask: Tensor) -> tuple[slice, ...]:
    chosen = numpy.flatnonzero(mask.cpu().numpy())
    ends = numpy.flatnonzero(chosen[1:] - chosen[:-1] > 1).tolist()
    firsts, lasts = ([0, *(end + 1 for end in ends)], [*ends, -1]) if len(chosen) else ([], [])
    return tuple(slice(int(chosen[first]), int(chosen[last]) + 1) for first, last in zip(firsts, lasts, strict=True))


def indicator_columns(segments: Segments, keys: int, batch: int, device: torch.device) -> Tensor:
    """One column per segment, 1 at its keys: (B or 1, 1, M, S)."""
    _check(segments)
    columns = [
        among(segment, keys, f"segment {name!r}", unit="keys", batch=batch).to(device)
        for name, segment in segments.items()
    ]
    rows = max(len(column) for column in columns)
    return torch.stack([column.expand(rows, keys) for column in columns], dim=-1).unsqueeze(1).float()


def _check(segments: Segments) -> None:
    if not isinstance(segments, Mapping) or not segments:
        raise ValueError(f'segments must be a mapping from names to keys, such as {{"sink": [0]}}, got {segments!r}')


def positions(index: Segment, length: int, what: str, unit: str) -> Tensor:
    """An index, a slice or several indices as a tensor of positions; negative ones count from the end."""
    return indices(index, length, what, unit=unit)
