"""A product of a stored matrix with values: which of its dimensions are heads, queries, keys and widths."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from regard.runtime.call import AttentionCall

_MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


@dataclass(frozen=True)
class Layout:
    """Where queries, keys and widths are among the dimensions of a product's two operands and its output.

    The orders bring matrix, values and output to (…, N, M), (…, M, D) and (…, N, D), with batches and heads before.
    """

    matrix: Tensor
    values: Tensor
    matrix_order: tuple[int, ...]
    values_order: tuple[int, ...]
    output_order: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key_dim(self) -> int:
        """That of the keys in the matrix as it is."""
        return self.matrix_order[-1]

    @property
    def lead(self) -> torch.Size:
        """Batches and heads."""
        matrix, values = self.matrix.permute(self.matrix_order), self.values.permute(self.values_order)
        lead: torch.Size = torch.broadcast_shapes(matrix.shape[:-2], values.shape[:-2])
        return lead

    def of_matrix(self, matrix: Tensor, heads: int | None) -> Tensor:
        """A tensor of the matrix's shape, such as its logits, as (B, H, N, M)."""
        return self._to_four(matrix.permute(self.matrix_order), heads)

    def of_values(self, heads: int | None) -> Tensor:
        """The values, (B, H, M, D)."""
        return self._to_four(self.values.permute(self.values_order), heads)

    def output(self, output: Tensor, call: AttentionCall) -> Tensor:
        """What the product returns, (B, H, N, D)."""
        output = output.permute(self.output_order)
        return output.reshape(*call.query.shape[:3], output.shape[-1])

    def undo(self, output: Tensor) -> Tensor:
        """An output (B, H, N, D) as the product returns it."""
        output = output.reshape(*self.lead, *output.shape[2:])
        back = sorted(range(output.ndim), key=self.output_order.__getitem__)
        return output.permute(back)

    def _to_four(self, tensor: Tensor, heads: int | None) -> Tensor:
        """The last of the leading dimensions are the heads; of one alone, as many as the module has."""
        lead = self.lead
        tensor = tensor.expand(*lead, *tensor.shape[-2:])
        if len(lead) == 1:
            heads = heads if heads is not None and lead[0] % heads == 0 else 1
            split: Tensor = tensor.unflatten(0, (-1, heads))
            return split
        return tensor.reshape(-1, lead[-1] if lead else 1, *tensor.shape[-2:])


def layout_of(function: Any, args: Any, is_matrix: Callable[[Any], bool]) -> Layout | None:
    """How a function multiplies a matrix with values; None where it is no such product."""
    if function in _MATMULS and len(args) == 2:
        left, right = args
        return _of_matmul(left, right, is_matrix)
    if function is torch.einsum and isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return _of_einsum(args[0], operands, is_matrix) if len(operands) == 2 else None
    return None


def _of_matmul(left: Tensor, right: Tensor, is_matrix: Callable[[Any], bool]) -> Layout | None:
    """``P V``, or ``Vᵀ Pᵀ``."""
    if min(left.ndim, right.ndim) < 2 or is_matrix(left) == is_matrix(right):
        return None
    is_left = is_matrix(left)
    matrix, values = (left, right) if is_left else (right, left)
    if isinstance(values, Parameter):
        return None
    ndim = max(matrix.ndim, values.ndim)
    return Layout(
        matrix, values, _order(matrix.ndim, is_left), _order(values.ndim, is_left), _order(ndim, is_left), left.dtype
    )


def _order(ndim: int, straight: bool) -> tuple[int, ...]:
    return (*range(ndim - 2), ndim - 2, ndim - 1) if straight else (*range(ndim - 2), ndim - 1, ndim - 2)


def _of_einsum(equation: str, operands: Any, is_matrix: Callable[[Any], bool]) -> Layout | None:
    """With one index of the keys, one of queries, one of widths, and all others in both operands."""
    found = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", _written_out(equation.replace(" ", ""), operands))
    if found is None or is_matrix(operands[0]) == is_matrix(operands[1]):
        return None
    first, second, output = found.groups()
    is_first = is_matrix(operands[0])
    of_matrix, of_values = (first, second) if is_first else (second, first)
    matrix, values = operands if is_first else operands[::-1]
    keys = [index for index in of_matrix if index in of_values and index not in output]
    queries = [index for index in of_matrix if index not in of_values]
    widths = [index for index in of_values if index not in of_matrix]
    lead = [index for index in of_matrix if index in of_values and index in output]
    if not len(keys) == len(queries) == len(widths) == 1 or isinstance(values, Parameter):
        return None
    if len(set(of_matrix)) < len(of_matrix) or sorted(output) != sorted([*lead, *queries, *widths]):
        return None
    lead.sort(key=output.index)
    return Layout(
        matrix, values,
        tuple(of_matrix.index(i) for i in (*lead, *queries, *keys)),
        tuple(of_values.index(i) for i in (*lead, *keys, *widths)),
        tuple(output.index(i) for i in (*lead, *queries, *widths)),
        matrix.dtype,
    )  # fmt: skip


def _written_out(equation: str, operands: Any) -> str:
    """The equation with an index for each dimension that its dots stand for, if both operands have as many there."""
    named = equation.split("->")[0].split(",")
    hidden = {operand.ndim - len(name) + 3 for operand, name in zip(operands, named, strict=False) if "..." in name}
    free = [letter for letter in string.ascii_letters if letter not in equation]
    return equation.replace("...", "".join(free[: hidden.pop()])) if len(hidden) == 1 else equation
