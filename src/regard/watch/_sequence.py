"""One text as one layer sees it: the calls of its passes, joined on a common axis of positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy
from torch import Tensor

from regard.runtime import Text


@dataclass(frozen=True)
class Part:
    """What was measured at one call, and where its queries and keys begin."""

    query_start: int
    key_start: int
    queries: int
    keys: int
    heads: list[int]
    measured: Mapping[str, Tensor]


@dataclass
class Sequence:
    """The parts of one text, in order, from the pass that began it. ``generate`` adds one for the prompt and one a step."""

    text: Text
    first_pass: int
    parts: list[Part] = field(default_factory=list)

    def join(self, variable: str, dims: tuple[str, ...], rows: list[Tensor | None]) -> numpy.ndarray:
        """One array (batch, heads, *dims) of all parts: put one after another along queries, or else added up.

        ``rows`` names for each part the batch rows to take, None for all; a row of −1 gives NaN.
        """
        arrays = [_choose(part.measured[variable], row) for part, row in zip(self.parts, rows, strict=True)]
        ends = {
            "query": max(part.query_start + part.queries for part in self.parts),
            "key": max(part.key_start + part.keys for part in self.parts),
        }
        shape = [max(array.shape[axis] for array in arrays) for axis in range(arrays[0].ndim)]
        for axis, dim in enumerate(dims, start=2):
            shape[axis] = ends.get(dim, shape[axis])
        joined = numpy.full(shape, numpy.nan, dtype=arrays[0].dtype)
        for part, array in zip(self.parts, arrays, strict=True):
            starts = {"query": part.query_start, "key": part.key_start}
            first = [0, 0, *(starts.get(dim, 0) for dim in dims)]
            place = joined[tuple(slice(a, a + size) for a, size in zip(first, array.shape, strict=True))]
            both = numpy.where(numpy.isnan(place), array, place + numpy.nan_to_num(array))
            if "position" in dims:  # the same row asked for again, of a text that has grown
                both = numpy.where(numpy.isnan(array), place, array)
            place[...] = array if "query" in dims else both
        return joined


def _choose(tensor: Tensor, rows: Tensor | None) -> numpy.ndarray:
    array: numpy.ndarray = tensor.numpy()
    if rows is None:
        return array
    chosen: numpy.ndarray = array[rows.clamp(min=0).numpy()]
    chosen[(rows < 0).numpy()] = numpy.nan
    return chosen
