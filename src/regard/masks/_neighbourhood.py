"""Each token of a line, a grid or a volume sees the tokens around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known

Value = TypeVar("Value", int, bool)


class _Axis(NamedTuple):
    """One dimension of the grid, and the number of tokens from one of its coordinates to the next."""

    size: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool
    step: int

    def place(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The dilation group of a token, and its coordinate within it."""
        coordinate = token // self.step % self.size
        if self.dilation == 1:
            return torch.zeros_like(coordinate), coordinate
        return coordinate % self.dilation, coordinate // self.dilation

    def window(self, group: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        """Where the window of a query begins and ends, in coordinates of its dilation group."""
        length = (self.size - group + self.dilation - 1) // self.dilation
        leader = coordinate // self.stride * self.stride + (self.stride - 1 if self.is_causal else self.stride // 2)
        leader = torch.minimum(leader, length - 1)
        if self.is_causal:
            return (leader - self.kernel_size + 1).clamp(min=0), coordinate + 1
        begin = torch.minimum((leader - self.kernel_size // 2).clamp(min=0), length - self.kernel_size)
        return begin, begin + self.kernel_size

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether along this dimension the key is of the query's dilation group and in its window."""
        (group, coordinate), (key_group, key_coordinate) = self.place(query), self.place(key)
        begin, end = self.window(group, coordinate)
        view = (key_coordinate >= begin) & (key_coordinate < end)
        return view & (group == key_group) if self.dilation > 1 else view


@dataclass(frozen=True, eq=False, repr=False)
class Neighbourhood(Mask):
    """Keys in the query's window along every dimension of the grid; see `neighbourhood`."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether it is along every dimension."""
        return reduce(and_, (axis.visible(query, key) for axis in self._axes()))

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the box that holds each tile's windows, and the box that holds its keys."""
        seen = full = torch.ones((), dtype=torch.bool, device=tiling.query.device)
        for axis in self._axes():
            (group, coordinate), (key_group, key_coordinate) = axis.place(tiling.query), axis.place(tiling.key)
            begin, end = axis.window(group, coordinate)
            (first_begin, last_begin), (first_end, last_end) = tiling.query_span(begin), tiling.query_span(end)
            first_key, last_key = tiling.key_span(key_coordinate)
            (low, high), (low_key, high_key) = tiling.query_span(group), tiling.key_span(key_group)
            seen = seen & (last_key >= first_begin) & (first_key < last_end) & (low <= high_key) & (low_key <= high)
            full = full & (first_key >= last_begin) & (last_key < first_end) & (low == high_key) & (low_key == high)
        return known(seen, full, certain=len(self.grid) == 1 and self.dilation == (1,))

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """No more tokens than the grid has."""
        if max(queries, keys) > math.prod(self.grid):
            raise ValueError(
                f"neighbourhood: a grid of {self.grid} has {math.prod(self.grid)} tokens, "
                f"but the call reaches {queries} queries and {keys} keys"
            )

    def _axes(self) -> Iterator[_Axis]:
        step = math.prod(self.grid)
        columns = zip(self.grid, self.kernel_size, self.dilation, self.stride, self.is_causal, strict=True)
        for size, kernel_size, dilation, stride, is_causal in columns:
            step //= size
            yield _Axis(size, kernel_size, dilation, stride, is_causal, step)

    def __repr__(self) -> str:
        parts = [f"{self.grid}, {self.kernel_size}"]
        for name, usual in (("dilation", 1), ("stride", 1), ("is_causal", False)):
            if any(value != usual for value in getattr(self, name)):
                parts.append(f"{name}={getattr(self, name)}")
        return f"neighbourhood({', '.join(parts)})"


def neighbourhood(
    grid: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Neighbourhood:
    """Each token of a grid sees the ``kernel_size`` nearest ones along every dimension, itself included.

    At the borders the window is shifted inwards, so that every query sees as many keys: Hassani, Walton, Li, Li and Shi,
    "Neighborhood Attention Transformer" (2023), with the parameters of the NATTEN library. Each of them may be one value,
    or one for each dimension.

    Args:
        grid: tokens along each of one to three dimensions, row after row.
        kernel_size: keys along each dimension, with ``kernel_size · dilation`` at most the grid's size.
        dilation: tokens see those that are a multiple of it away (Hassani and Shi, "Dilated Neighborhood Attention
            Transformer", 2022).
        stride: neighbouring queries, so many, share the window of the one in their middle (of the last one, where causal):
            Hassani et al., "Generalized Neighborhood Attention" (2025). With the kernel's size it is blocked attention.
        is_causal: see no key with a larger coordinate; then windows at the begin of the dimension are cut off, not shifted.

    >>> from regard import masks
    >>> masks.neighbourhood(5, kernel_size=3).dense(1, 1, 5, 5)[0, 0].int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    >>> masks.neighbourhood((16, 32, 32), kernel_size=(8, 9, 9), is_causal=(True, False, False))
    neighbourhood((16, 32, 32), (8, 9, 9), is_causal=(True, False, False))
    """
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"neighbourhood: a grid has one to three dimensions of at least one token, got {grid!r}")
    kernels = _each("kernel_size", kernel_size, sizes)
    dilations, strides = _each("dilation", dilation, sizes), _each("stride", stride, sizes)
    for axis, (size, kernel, apart, shared) in enumerate(zip(sizes, kernels, dilations, strides, strict=True)):
        if min(kernel, apart) < 1 or kernel * apart > size:
            raise ValueError(
                f"neighbourhood: kernel_size · dilation is {kernel} · {apart} along dimension {axis}, "
                f"which has {size} tokens; it must be from 1 to that"
            )
        if not 1 <= shared <= kernel:
            raise ValueError(
                f"neighbourhood: stride is from 1 to kernel_size ({kernel}) along dimension {axis}, got {shared}"
            )
    return Neighbourhood(sizes, kernels, dilations, strides, _each("is_causal", is_causal, sizes))


def _each(name: str, value: Value | Sequence[Value], grid: tuple[int, ...]) -> tuple[Value, ...]:
    """One value for each dimension."""
    values = (value,) * len(grid) if isinstance(value, int) else tuple(value)
    if len(values) != len(grid):
        raise ValueError(f"neighbourhood: {name} is one value or one for each dimension of {grid}, got {value!r}")
    return values
