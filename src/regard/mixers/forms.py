"""The three forms of a mechanism, and the checks that all share."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Form = Literal["parallel", "chunked", "recurrent"]
"""The readable reference, the fast one for training and prompts, and the one that decodes token by token."""


def check_form(form: str) -> None:
    """Refuse a form of another name."""
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}; got {form!r}")


def check_heads(query: Tensor, key: Tensor, value: Tensor, *, cross: bool = False) -> None:
    """Refuse queries, keys and values that do not belong together; keys may be of other tokens where it is ``cross``."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        raise ValueError(f"query, key and value must be (batch, heads, tokens, dim), got {shapes}")
    differ = [axis for axis in range(4) if query.shape[axis] != key.shape[axis] and not (cross and axis == 2)]
    if differ or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"query and key must be of one shape, and value differ in its last dimension only, got {shapes}"
        )
    if not query.shape[2] or not key.shape[2]:
        raise ValueError(f"there are no tokens: query, key and value are of shapes {shapes}")


def initial_state(state: Tensor | None, query: Tensor, value: Tensor) -> Tensor:
    """The state (B, H, Dk, Dv) to begin with, in float32 at least: zeros where there is none; another shape is refused."""
    shape = (*query.shape[:2], query.shape[3], value.shape[3])
    dtype = torch.promote_types(value.dtype, torch.float32)
    if state is None:
        return query.new_zeros(shape, dtype=dtype)
    if state.shape != shape:
        raise ValueError(f"the state must be of shape {shape}, got {tuple(state.shape)}")
    return state.to(dtype)


def cut(tensor: Tensor, chunk: int) -> Tensor:
    """Whole chunks; zeros at the end neither add to the state nor decay it."""
    padded = functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % chunk))
    return padded.reshape(*padded.shape[:2], -1, chunk, padded.shape[3])


def softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``.

    >>> softplus(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([0.0000e+00, 6.9315e-01, 1.0000e+02])
    """
    # The slope of PyTorch's own is laid out in memory otherwise than compiled code takes it to be, and is refused there.
    return torch.logaddexp(x, x.new_zeros(()))
