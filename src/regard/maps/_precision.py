"""Questions are answered in the precision of the map, whatever autocast would make of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


P = ParamSpec("P")
Map = TypeVar("Map", bound=_OnDevice)
Result = TypeVar("Result")


def in_own_precision(question: Callable[Concatenate[Map, P], Result]) -> Callable[Concatenate[Map, P], Result]:
    """Ask with autocast switched off, which would run the products in half precision."""

    @wraps(question)
    def ask(self: Map, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        device = self.device.type
        if not torch.is_autocast_enabled(device):
            return question(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return question(self, *args, **kwargs)

    return ask


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Say that tangents are not carried, where a kernel would lose them.

    Raises:
        NotImplementedError: one of the tensors has a tangent.
    """
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "an AttentionMap carries no forward-mode tangents (torch.func.jvp, forward_ad); use gradients, or the "
                "stored softmax(scale · Q Kᵀ + mask)"
            )
