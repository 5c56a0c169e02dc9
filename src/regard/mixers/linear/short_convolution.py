"""A causal convolution over the last few tokens, with a state: many mixers look through one at their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional

from regard.mixers.mixer import split_heads


class ShortConvolution(Module):
    """``y_i = SiLU(Σ_m w_{width − 1 − m} ∘ x_{i−m} + b)`` over the last ``width`` tokens, each channel by itself.

    The state is the last ``width − 1`` tokens, (B, width − 1, dim).

    Args:
        dim: channels.
        width: tokens that each sees, itself among them; the last of the taps is its own, as in `torch.nn.Conv1d`.
        bias: whether there is a b.
        activation: whether there is a SiLU.

    Raises:
        ValueError: a width below 1.

    >>> import torch
    >>> convolution, x = ShortConvolution(8), torch.randn(2, 10, 8)
    >>> whole, _ = convolution(x)
    >>> first, tail = convolution(x[:, :6])
    >>> rest, _ = convolution(x[:, 6:], tail)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6))
    True
    """

    def __init__(self, dim: int, width: int = 4, bias: bool = False, activation: bool = True) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ShortConvolution: width must be at least 1, got {width}")
        self.width, self.activation = width, activation
        bound = width**-0.5
        taps = torch.empty(dim, 1, width).uniform_(-bound, bound)
        self.weight = Parameter(taps.flip(-1))  # the own token's drawn first: a seed gives what it gave
        self.bias = Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The convolved tokens (B, N, dim), and the tail that goes on; padding comes first, as in `Mixer.mix`."""
        batch, length, dim = x.shape
        before = x.new_zeros(batch, self.width - 1, dim) if tail is None else tail
        joined = torch.cat([before, x], dim=1)
        if mask is not None and tail is not None:  # the tail goes right before the first real token
            real = torch.cat([mask.new_ones(batch, self.width - 1), mask], dim=1)
            order = real.long().argsort(dim=1, stable=True)[..., None]
            joined = joined.gather(1, order.expand_as(joined))
        convolved = functional.conv1d(joined.mT, self.weight, self.bias, groups=dim).mT
        return functional.silu(convolved) if self.activation else convolved, joined[:, length:]


def convolved_parts(
    parts: Sequence[Tensor], convolution: ShortConvolution | None, tail: Tensor | None, mask: Tensor | None
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """Tensors (B, N, D) behind one convolution, and its tail by name; as they are where there is no convolution."""
    if convolution is None:
        return parts, {}
    joined, tail = convolution(torch.cat(list(parts), dim=-1), tail, mask)
    return joined.split([part.shape[-1] for part in parts], dim=-1), {"tail": tail}


def convolved_heads(
    x: Tensor,
    projections: Iterable[Module],
    convolution: ShortConvolution,
    heads: int,
    tail: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What three projections make of the tokens, (B, H, N, D) each, behind one convolution; and its tail."""
    parts, after = convolved_parts([projection(x) for projection in projections], convolution, tail, mask)
    query, key, value = (split_heads(part, heads) for part in parts)
    return query, key, value, after["tail"]
