"""Parts of a text one after another, each computed again in the backward pass, so that one at a time is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGE = 512 * 1024
"""Numbers, of which to store one for each part would outweigh the parts."""

Part = TypeVar("Part")
Held = TypeVar("Held")
Step = Callable[[Part, Held], tuple[Tensor, Held]]
"""The output of a part, and what is held after it, from the part and what was held before."""


def in_turn(
    step: Step[Part, Held], parts: Sequence[Part], held: Held, numbers: int, group: int = 1
) -> tuple[list[Tensor], Held]:
    """The outputs of all parts, and what is held after the last.

    Where gradients are wanted and there are several groups of parts, what was held before each group is stored, and all else
    computed again in the backward pass. Where that is a lot, it is stored before each of √n groups, and before each part of a
    group while that is computed again: 2 √n in place of n, for one more pass.

    Args:
        step: the output of a part, and what is held after it.
        parts: of a text.
        held: before the first.
        numbers: in what is held.
        group: parts that are computed again together.

    >>> import torch
    >>> in_turn(lambda part, held: (part + held, held + 1), [torch.zeros(1), torch.ones(1)], 5, 1)
    ([tensor([5.]), tensor([7.])], 7)
    """
    many = numbers > LARGE and len(parts) > 3
    size = math.isqrt(len(parts)) if many else group
    if len(parts) <= size or not torch.is_grad_enabled():
        return _plainly(step, parts, held)
    inner = _each_again if many else _plainly
    outputs: list[Tensor] = []
    for start in range(0, len(parts), size):
        some, held = _again(partial(inner, step), parts[start : start + size], held)
        outputs += some
    return outputs, held


def _plainly(step: Step[Part, Held], parts: Sequence[Part], held: Held) -> tuple[list[Tensor], Held]:
    outputs = []
    for part in parts:
        output, held = step(part, held)
        outputs.append(output)
    return outputs, held


def _each_again(step: Step[Part, Held], parts: Sequence[Part], held: Held) -> tuple[list[Tensor], Held]:
    return _plainly(lambda part, held: _again(step, part, held), parts, held)


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)
