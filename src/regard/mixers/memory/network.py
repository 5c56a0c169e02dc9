"""The network that is a memory: what it gives for a query, and the slopes of its loss by what its weights are products of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Pass(NamedTuple):
    """What a network gives for its inputs, and on the way: each layer's inputs, its own, and the last one's, normed."""

    output: Tensor
    inputs: list[Tensor]
    given: list[Tensor]
    normed: Tensor
    inverse: Tensor | None


def network(product: Product, depth: int, x: Tensor, gain: Tensor) -> Pass:
    """``M(x) = W x`` or ``x + γ ∘ LN(W_L GELU(… W_1 x))``."""
    inputs, given = [x], [product(0, x)]
    for layer in range(1, depth):
        inputs.append(functional.gelu(given[-1]))
        given.append(product(layer, inputs[-1]))
    if depth == 1:
        return Pass(given[0], inputs, given, given[0], None)
    normed, inverse = _norm(given[-1])
    return Pass(x + gain * normed, inputs, given, normed, inverse)


def recall(query: Tensor, weights: Sequence[Tensor], gain: Tensor) -> Tensor:
    """``M(q)``, nothing written: (B, H, N, Dv), from weights (B, H, out, in) of each layer and γ (H, 1, Dv)."""
    return network(lambda layer, a: a @ weights[layer].mT, len(weights), query, gain).output


def slopes(
    weights: Sequence[Tensor], key: Tensor, value: Tensor, threshold: Tensor | None, gain: Tensor, bias: Bias
) -> list[tuple[Tensor, Tensor]]:
    """The gradient of ``ℓ(M(k), v)`` by a layer's weights is ``δ zᵀ``: its δ (B, H, N, out) and z (B, H, N, in)."""
    found = network(lambda layer, a: a @ weights[layer].mT, len(weights), key, gain)
    delta = bias.slope(found.output, value, threshold)
    if found.inverse is not None:
        delta = _through_norm(gain * delta, found.normed, found.inverse)
    deltas = [delta]
    for layer in range(len(weights) - 1, 0, -1):
        deltas.insert(0, torch.ops.aten.gelu_backward(deltas[0] @ weights[layer], found.given[layer - 1]))
    return list(zip(deltas, found.inputs, strict=True))


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer norm, and the inverse of the deviation.

    By hand: the gradient of PyTorch's loses two digits where the mean is large, as positive weights make it.
    """
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
    return centred * inverse, inverse


def _through_norm(delta: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The slope by the input of a layer norm, from that by its output."""
    slope: Tensor = inverse * (delta - normed * (delta * normed).mean(-1, keepdim=True))
    return slope - slope.mean(-1, keepdim=True)  # last, so that positive weights meet a sum of zero to the last digit
