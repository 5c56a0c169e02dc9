"""Titans: memory as context, gate and layer."""

from collections.abc import Callable

import pytest
import torch

from regard.mixers import Memory, MemoryAsContext, MemoryAsGate, MemoryAsLayer, Mixer
from regard.mixers.softmax.prefixed_attention import PrefixedWindow
from tests.mixers.contract import check_mixer
from tests.mixers.learning import recall_losses

KINDS = [MemoryAsContext, MemoryAsGate, MemoryAsLayer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [1, 8, 64])
def test_layer(kind: Callable[..., Mixer], reach: int) -> None:
    torch.manual_seed(0)
    # As context, what the memory gives is attended to, and what is attended to is written: three roundings, one on another.
    mixer = kind(24, 3, reach, chunk=5, persistent=3, largest_step=1 / 32)
    check_mixer(mixer, half=8e-2 if kind is MemoryAsContext else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_with_a_matrix(kind: Callable[..., Mixer]) -> None:
    torch.manual_seed(0)
    check_mixer(kind(16, 2, 6, memory=Memory(depth=1)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_those_after_it(kind: Callable[..., Mixer]) -> None:
    torch.manual_seed(0)
    mixer = kind(16, 2, 8, chunk=4)
    x = torch.randn(1, 30, 16, requires_grad=True)
    y, _ = mixer(x)
    for token in (0, 3, 11, 20, 29):
        (slope,) = torch.autograd.grad(y[:, token].sum(), x, retain_graph=True)
        assert not slope[:, token + 1 :].any()
        assert slope[:, token].any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_reaches_beyond_attention(kind: Callable[..., Mixer]) -> None:
    torch.manual_seed(0)
    mixer = kind(16, 2, 4, chunk=4)
    x = torch.randn(1, 30, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(mixer(x)[0][:, -1].sum(), x)
    assert slope[:, 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_learns(kind: Callable[..., Mixer]) -> None:
    torch.manual_seed(0)
    before, after = recall_losses(kind(16, 2, 8, chunk=8))
    assert after < before - 0.5


def test_window_attention_with_a_prefix() -> None:
    torch.manual_seed(0)
    attention, x, prefix = PrefixedWindow(16, heads=2, window=5), torch.randn(2, 23, 16), torch.randn(3, 16)
    (query, key, value), (_, *kept) = attention.project(x), attention.project(prefix[None])
    distance = torch.arange(23)[:, None] - torch.arange(23)
    near = attention.rotate(query, 0) @ attention.rotate(key, 0).mT
    near = near.masked_fill((distance < 0) | (distance >= 5), -torch.inf)
    weights = (torch.cat([query @ kept[0].mT, near], -1) / 8**0.5).softmax(-1)
    mixed = weights @ torch.cat([kept[1].expand(2, -1, -1, -1), value], 2)
    expected = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, prefix)[0], expected)


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"MemoryAsGate: pairs of features are turned.*dim=9 and heads=3 make it 3"):
        MemoryAsGate(9, heads=3)
    with pytest.raises(ValueError, match=r"MemoryAsContext: attention must reach at least 1 token.*got 0 and 4"):
        MemoryAsContext(8, heads=2, segment=0)
    mixer, x = MemoryAsLayer(8, heads=2), torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match=r"MemoryAsLayer goes on from a state of its own, got a state of MemoryAsGate"):
        mixer(x, MemoryAsGate(8, heads=2)(x)[1])
