"""The choices that make an associative memory: what it is, by which loss it learns, and how it keeps what it has learned.

Miras' four choices are the memory (`Memory`), the attentional bias (`Bias`), the retention (`Retention`) and the learning
rule (gradient descent, with momentum or without); a `Design` holds them. A. Behrouz et al. (2025), It's All Connected: A
Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

_SMOOTH = 1e-6
_FLOOR = 1.0


@dataclass(frozen=True)
class Memory:
    """A matrix, ``M(x) = W x`` (depth 1), or a network, ``M(x) = x + γ ∘ LN(W_L GELU(… W_1 x))``.

    Args:
        depth: matrices of the memory.
        expansion: how much wider than its input a hidden layer is.

    >>> Memory().shapes(16, 16)
    [(64, 16), (16, 64)]
    """

    depth: int = 2
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.depth < 1 or self.expansion < 1:
            raise ValueError(
                f"Memory: depth and expansion must be at least 1, got depth={self.depth} and expansion={self.expansion}"
            )

    def shapes(self, inputs: int, outputs: int) -> list[tuple[int, int]]:
        """The shapes of the memory's matrices, (outputs, inputs) each."""
        widths = [inputs, *[self.expansion * inputs] * (self.depth - 1), outputs]
        return [(after, before) for before, after in pairwise(widths)]


class Bias(ABC):
    """An attentional bias: the loss ``ℓ(M(k), v)`` that a memory lowers, summed over the last dimension, and its slope."""

    @abstractmethod
    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """ℓ, from outputs and values (..., D)."""

    @abstractmethod
    def slope(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """``∂ℓ / ∂M(k)``."""


@dataclass(frozen=True)
class Lp(Bias):
    """``‖M(k) − v‖_p^p / p``: 2 for Titans and the delta rules, 3 for Moneta; |r| is smoothed as √(r² + 10⁻⁶).

    >>> import torch
    >>> Lp(3.0).slope(torch.tensor([2.0, -3.0]), torch.zeros(2), None).round(decimals=3)
    tensor([ 4., -9.])
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"Lp: p must be at least 1, got {self.p}")

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """ℓ, from outputs and values (..., D)."""
        return ((output - value).square() + _SMOOTH).pow(self.p / 2).sum(-1) / self.p

    def slope(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """``r |r|^{p−2}``, with ``r = M(k) − v``."""
        error = output - value
        return error if self.p == 2 else error * (error.square() + _SMOOTH).pow(self.p / 2 - 1)


@dataclass(frozen=True)
class Huber(Bias):
    """Quadratic for errors below a threshold, linear beyond, coordinate by coordinate: an outlier pulls no harder than δ."""

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """ℓ, from outputs and values (..., D)."""
        error, delta = (output - value).abs(), _given(threshold)
        return (error.square() / 2).where(error <= delta, delta * (error - delta / 2)).sum(-1)

    def slope(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """The error, cut at ±δ."""
        delta = _given(threshold)
        return (output - value).maximum(-delta).minimum(delta)


@dataclass(frozen=True)
class DotProduct(Bias):
    """``−⟨M(k), v⟩``: Hebb's rule, by which linear attention learns."""

    def loss(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """ℓ, from outputs and values (..., D)."""
        return -(output * value).sum(-1)

    def slope(self, output: Tensor, value: Tensor, threshold: Tensor | None) -> Tensor:
        """``−v``, whatever the memory holds."""
        return -value.expand_as(output)


def _given(threshold: Tensor | None) -> Tensor:
    if threshold is None:
        raise ValueError("the Huber bias needs a threshold for each token and channel, got None")
    return threshold


class Retention(ABC):
    """How weights follow from what is held, which is what decays and what gradients are taken from: ``W = s(A_start) A``."""

    linear: ClassVar[bool] = True
    """Whether the weights of a chunk are a multiple of what is held, so that no token needs weights of its own."""

    def weights(self, held: Tensor, start: Tensor) -> Tensor:
        """W from what is held (..., out, in), and from what was held at the chunk's start."""
        scale = self.scale(start)
        return held if scale is None else held * scale

    @abstractmethod
    def scale(self, start: Tensor) -> Tensor | None:
        """The factor s of what is held, (..., 1, 1); None for 1."""

    @abstractmethod
    def begin(self, weights: Tensor) -> Tensor:
        """What to hold at first, so that the weights are spread about as these are, of variance 1."""


@dataclass(frozen=True)
class Decay(Retention):
    """ℓ₂ retention, weight decay: the weights are what is held."""

    def scale(self, start: Tensor) -> None:
        """Weights are what is held: s = 1."""

    def begin(self, weights: Tensor) -> Tensor:
        """What is held at first is the weights themselves."""
        return weights


@dataclass(frozen=True)
class Lq(Retention):
    """ℓ_q retention: ``W = A / ‖A‖_q^{q−2}``, the norm of each matrix taken at the chunk's start.

    For q above 2, W and each step's effect on it grow where A shrinks. The norm is therefore of A's mean power, which sets
    A's scale alone, and has a floor of 1, ``‖A‖_q^q = mean |A|^q + 1``: without one, gradients explode where much was
    forgotten.

    >>> import torch
    >>> float(Lq(4.0).scale(torch.zeros(8, 4))), round(float(Lq(4.0).scale(3 * torch.ones(8, 4))), 3)
    (1.0, 0.11)
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        if self.q < 2 or self.q == 3:
            raise ValueError(f"Lq: q must be at least 2, and not 3 (where W keeps no scale), got {self.q}")

    def scale(self, start: Tensor) -> Tensor:
        """The factor ``s = ‖A_start‖_q^{2−q}`` of each matrix."""
        norm = start.square().pow(self.q / 2).mean((-2, -1), keepdim=True) + _FLOOR  # to the power of q
        return norm.pow((2 - self.q) / self.q)

    def begin(self, weights: Tensor) -> Tensor:
        """A with ``A / ‖A‖_q^{q−2} = W`` but for the floor: ``‖W‖_q = ‖A‖_q^{3−q}``."""
        norm = weights.abs().pow(self.q).mean((-2, -1), keepdim=True).pow(1 / self.q)
        return weights * norm.clamp(min=_SMOOTH).pow((self.q - 2) / (3 - self.q))


@dataclass(frozen=True)
class KL(Retention):
    """Kullback–Leibler retention: what is held are log weights, and ``W = c softmax(A)``, each output unit's over its inputs.

    Weights are positive and sum to c, for which the number of inputs is taken: then they are 1 on average.
    """

    linear: ClassVar[bool] = False

    def weights(self, held: Tensor, start: Tensor) -> Tensor:
        """W from log weights."""
        weights: Tensor = held.shape[-1] * held.softmax(-1)
        return weights

    def scale(self, start: Tensor) -> Tensor:
        """Refuse: a softmax is no multiple of what is held."""
        raise NotImplementedError("a softmax of log weights is no multiple of them")

    def begin(self, weights: Tensor) -> Tensor:
        """Log weights of variance 1."""
        return weights


@dataclass(frozen=True)
class Design:
    """Miras' four choices; the learning rule is gradient descent, with momentum or without.

    >>> Design(bias=Lp(3), retention=Lq(4)).momentum
    False
    """

    memory: Memory = Memory()
    bias: Bias = Lp()
    retention: Retention = Decay()
    momentum: bool = False
