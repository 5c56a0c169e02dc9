"""Parts of a text one after another, each made again in the backward pass, so that what one of them stores is all there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Part = TypeVar("Part")
Held = TypeVar("Held")
Step = Callable[[Part, Held], tuple[Tensor, Held]]
"""The output of a part, and what is held after it, from the part and what was held before."""


def in_turn(
    step: Step[Part, Held], parts: Sequence[Part], held: Held, large: Callable[[Held], bool]
) -> tuple[list[Tensor], Held]:
    """The outputs of all parts, and what is held after the last.

    Where gradients are wanted and there are several parts, what was held before each is stored, and all else computed again
    in the backward pass. Of what is large, one is stored for each of √n groups, and one for each part of a group while that is
    computed again: 2 √n in place of n, for one more pass.

    >>> import torch
    >>> in_turn(lambda part, held: (part + held, held + 1), [torch.zeros(1), torch.ones(1)], 5, lambda held: False)
    ([tensor([5.]), tensor([7.])], 7)
    """
    if len(parts) == 1 or not torch.is_grad_enabled():
        return _plainly(step, parts, held)
    output, held = _again(step, parts[0], held)
    outputs, rest = [output], parts[1:]
    if not large(held) or len(rest) < 4:
        others, held = _each_again(step, rest, held)
        return outputs + others, held
    size = math.ceil(math.sqrt(len(rest)))
    for start in range(0, len(rest), size):
        others, held = _again(lambda group, held: _each_again(step, group, held), rest[start : start + size], held)
        outputs += others
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
