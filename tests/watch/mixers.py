"""Mixers to watch, and their stored matrices."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regard.mixers import (
    AdaptiveFilterAttention,
    Based,
    ChunkedSoftmaxAttention,
    DeltaRule,
    DotProduct,
    LightningAttention,
    Memory,
    Miras,
    Mixer,
    SelectiveSSM,
    SlidingWindow,
    SoftmaxAttention,
    ValueMixer,
)
from regard.mixers.memory.choices import Design

DIM, TOKENS = 8, 11

KINDS: dict[str, Callable[[], Mixer]] = {
    "DeltaRule": lambda: DeltaRule(DIM, heads=2),
    "LightningAttention": lambda: LightningAttention(DIM, heads=2),
    "Based": lambda: Based(DIM, heads=2, features=4, window=3),
    "SlidingWindow": lambda: SlidingWindow(DIM, heads=2, window=3),
    "SelectiveSSM": lambda: SelectiveSSM(DIM),
    "Miras": lambda: Miras(DIM, heads=2, design=Design(Memory(depth=1), bias=DotProduct())),
    "AdaptiveFilterAttention": lambda: AdaptiveFilterAttention(DIM, heads=2),
    "ChunkedSoftmaxAttention": lambda: ChunkedSoftmaxAttention(DIM, heads=2, query_chunk=4, key_chunk=3),
    "SoftmaxAttention": lambda: SoftmaxAttention(DIM, heads=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_hidden_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if "Softmax" not in kind])


def built(kind: str) -> Mixer:
    return KINDS[kind]().double().eval()


def text(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, DIM, dtype=torch.float64)


def matrix_of(mixer: Mixer, x: Tensor) -> np.ndarray:
    """The stored matrix, one product with the identity."""
    with torch.no_grad():
        return np.asarray(mixer.map(x) @ torch.eye(x.shape[1], dtype=x.dtype)[None, None])


def value_of(mixer: Mixer, x: Tensor) -> np.ndarray:
    """What the mixer's matrix mixes, from its own projections."""
    assert isinstance(mixer, ValueMixer)
    return np.asarray(mixer.project(x).value)


def largest(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest entries of each row and their keys, NaN where they are 0."""
    order = np.argsort(-matrix, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(matrix, order, axis=-1)
    return np.where(best == 0, np.nan, best), np.where(best == 0, np.nan, order)


class Block(nn.Module):
    """A layer of a model: a mixer, or PyTorch's attention, beside what goes around it."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x) if isinstance(self.mixer, Mixer) else self.mixer(x, x, x)
        y: Tensor = x + mixed[0]
        return y


def hybrid() -> nn.Sequential:
    """Hidden maps of 2 and 4 heads, attention of 2 heads between them."""
    attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
    layers = (DeltaRule(DIM, heads=2), attention, LightningAttention(DIM, heads=4), SoftmaxAttention(DIM, heads=2))
    return nn.Sequential(*(Block(layer) for layer in layers)).double().eval()
