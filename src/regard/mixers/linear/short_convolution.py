"""A causal convolution over the last few tokens, with a state: many mixers look through one at their inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional

from regard.mixers.mixer import split_heads


class ShortConvolution(Module):
    """``y_i = SiLU(Σ_m w_m ∘ x_{i−m})`` over the last ``width`` tokens, each channel by itself.

    The state is the last ``width − 1`` tokens, (B, width − 1, dim).

    >>> import torch
    >>> convolution, x = ShortConvolution(8), torch.randn(2, 10, 8)
    >>> whole, _ = convolution(x)
    >>> first, tail = convolution(x[:, :6])
    >>> rest, _ = convolution(x[:, 6:], tail)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6))
    True
    """

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ShortConvolution: width must be at least 1, got {width}")
        self.width = width
        bound = width**-0.5
        self.weight = Parameter(torch.empty(dim, 1, width).uniform_(-bound, bound))

    def forward(self, x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The convolved tokens (B, N, dim), and the tail that goes on; padding comes first, as in `Mixer.mix`."""
        batch, length, dim = x.shape
        before = x.new_zeros(batch, self.width - 1, dim) if tail is None else tail
        joined = torch.cat([before, x], dim=1)
        if mask is not None and tail is not None:  # the tail goes right before the first real token
            real = torch.cat([mask.new_ones(batch, self.width - 1), mask], dim=1)
            order = real.long().argsort(dim=1, stable=True)[..., None]
            joined = joined.gather(1, order.expand_as(joined))
        convolved = functional.conv1d(joined.mT, self.weight.flip(-1), groups=dim).mT
        return functional.silu(convolved), joined[:, length:]


def convolved_heads(
    x: Tensor,
    projections: Iterable[Module],
    convolution: ShortConvolution,
    heads: int,
    tail: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What three projections make of the tokens, (B, H, N, D) each, behind one convolution; and its tail."""
    joined = torch.cat([projection(x) for projection in projections], dim=-1)
    convolved, tail = convolution(joined, tail, mask)
    query, key, value = (split_heads(part, heads) for part in convolved.chunk(3, dim=-1))
    return query, key, value, tail
