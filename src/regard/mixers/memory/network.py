"""The network that is a memory: what it gives for a query, and the slopes of its loss by what its weights are products of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from regard.mixers.memory.choices import Bias

_EPSILON = 1e-5
"""Of the layer norm. As long as it is small beside the variance, what the network gives does not depend on its weights'
scale, so that the slopes grow as weights decay, and what decays is written again. Where it is not small, decay wins, and the
memory ends at zero, from where no slope leads away."""

Product = Callable[[int, Tensor], Tensor]
"""From the number of a layer and its inputs (..., in) to its weights' product with them, (..., out)."""


def network(product: Product, depth: int, x: Tensor, gain: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``M(x) = W x`` or ``x + γ ∘ LN(W_L GELU(… W_1 x))``, and what each layer gives, before what comes after it."""
    given = [product(0, x)]
    for layer in range(1, depth):
        given.append(product(layer, functional.gelu(given[-1])))
    if depth == 1:
        return given[0], given
    return x + gain * _norm(given[-1])[0], given


def recall(query: Tensor, weights: Sequence[Tensor], gain: Tensor) -> Tensor:
    """``M(q)``, nothing written: (B, H, N, Dv), from weights (B, H, out, in) of each layer and γ (H, 1, Dv)."""
    return network(lambda layer, a: a @ weights[layer].mT, len(weights), query, gain)[0]


def slopes(
    weights: Sequence[Tensor], key: Tensor, value: Tensor, threshold: Tensor | None, gain: Tensor, bias: Bias
) -> list[tuple[Tensor, Tensor]]:
    """The gradient of ``ℓ(M(k), v)`` by a layer's weights is ``δ zᵀ``: its δ (B, H, N, out) and z (B, H, N, in)."""
    output, given = network(lambda layer, a: a @ weights[layer].mT, len(weights), key, gain)
    delta = bias.slope(output, value, threshold)
    if len(weights) > 1:
        delta = _through_norm(gain * delta, given[-1])
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        deltas.insert(0, (deltas[0] @ weights[layer]) * _gelu_slope(given[layer - 1]))
    return list(zip(deltas, [key, *(functional.gelu(x) for x in given[:-1])], strict=True))


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer norm, and the inverse of the deviation.

    By hand: the gradient of PyTorch's loses two digits where the mean is large, as positive weights make it.
    """
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
    return centred * inverse, inverse


def _through_norm(delta: Tensor, x: Tensor) -> Tensor:
    """The slope by the input of a layer norm, from that by its output."""
    normed, inverse = _norm(x)
    slope: Tensor = inverse * (delta - normed * (delta * normed).mean(-1, keepdim=True))
    return slope - slope.mean(-1, keepdim=True)  # last, so that positive weights meet a sum of zero to the last digit


def _gelu_slope(x: Tensor) -> Tensor:
    """``Φ(x) + x φ(x)``."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
