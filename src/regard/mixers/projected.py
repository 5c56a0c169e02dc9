"""What a mixer makes of tokens before it mixes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Projected:
    """Values, and by name what mixes them, what the output needs besides, and what the state takes of the projections.

    Args:
        value: (B, H, M, Dv), what is mixed.
        parts: queries and keys, (B, H, N, D), gates, decays, whatever the mechanism has.
        after: of the state after the tokens: a convolution's tail, a count of positions.

    >>> import torch
    >>> from regard.mixers import DeltaRule
    >>> projected = DeltaRule(32, heads=4).project(torch.randn(1, 10, 32))
    >>> projected["key"].shape, sorted(projected.after)
    (torch.Size([1, 4, 10, 8]), ['tail'])
    """

    value: Tensor
    parts: Mapping[str, Tensor]
    after: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A part."""
        return self.parts[name]

    def get(self, name: str) -> Tensor | None:
        """A part, None where there is none of this name."""
        return self.parts.get(name)

    def with_value(self, value: Tensor) -> Projected:
        """Mixing as here, of other values, of any width."""
        return replace(self, value=value)

    def constant(self) -> Projected:
        """Cut off from its graph, such that autograd may use it again, made in inference mode or not."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor.detach()

        return Projected(cut(self.value), _each(self.parts, cut), _each(self.after, cut))


def _each(tensors: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(tensor) for name, tensor in tensors.items()}
