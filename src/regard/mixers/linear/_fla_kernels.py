"""Triton kernels of flash-linear-attention in the place of chunked forms, on a GPU where that package is installed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_WIDEST = 256  # keys that its delta rules hold in a processor's own memory

Operator = Callable[..., tuple[Tensor, Tensor]]


def operator(name: str, query: Tensor, value: Tensor) -> Operator | None:
    """The kernel ``fla.ops.NAME.chunk_NAME``, if it fits: heads (B, H, N, D) on a GPU, values in half precision, and more
    than one token. In float32 its products would be of fewer digits than those of the form that it stands in for.
    """
    fits = _on_gpu(query) and value.dtype in _HALF and query.shape[2] > 1 and query.shape[3] <= _WIDEST
    return _imported(name) if fits else None


def run(kernel: Operator, heads: dict[str, Tensor], value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call a kernel, which has tokens before heads, scales queries unless told, and keeps its state in float32.

    Args:
        kernel: that `operator` found.
        heads: by its names: q, k and v in the values' dtype, decays in float32; (B, H, N, …).
        value: the values, of whose dtype the output is.
        state: (B, H, Dk, Dv), if there is one to begin with.
    """
    before = None if state is None else state.float().contiguous()
    tokens = {name: tensor.transpose(1, 2).contiguous() for name, tensor in heads.items()}
    output, after = kernel(**tokens, scale=1.0, initial_state=before, output_final_state=True)
    return output.transpose(1, 2).to(value.dtype), after


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@cache
def _imported(name: str) -> Operator | None:
    try:
        kernel: Any = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "fla":
            warnings.warn(
                f"flash-linear-attention is installed and cannot be imported ({error}): mixers do without its kernels",
                stacklevel=2,
            )
        return None
    return kernel  # type: ignore[no-any-return]
