"""A mixer's map is made where somebody asks for it, once, and what goes wrong in it is told."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.mixers import DeltaRule, HiddenMap, catalogue

KINDS = catalogue.mixers()


class Model(nn.Module):
    """Two layers of a mixer, and one of attention after them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeltaRule(16, heads=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        heads = x[:, None]
        return x + nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]


def maps_made(block: Any, model: Model) -> list[int]:
    """The numbers of the layers whose maps were made."""
    made, plain = list[int](), DeltaRule.hidden_map

    def map_of(self: DeltaRule, *arguments: Any) -> HiddenMap:
        made.append(list(model.layers).index(self))
        return plain(self, *arguments)

    with patch.object(DeltaRule, "hidden_map", map_of), torch.no_grad(), block:
        model(torch.randn(1, 9, 16))
    return made


def test_maps_are_made_where_they_are_wanted() -> None:
    model = Model()
    assert maps_made(regard.watch(model, regard.Received(), regard.TopK(2)), model) == [0, 1]
    assert maps_made(regard.watch(model, regard.Received(), layers=[1]), model) == [1]
    assert maps_made(regard.steer(model, regard.Temperature(2.0, layers=[2])), model) == []


def test_what_goes_wrong_in_a_map_is_told() -> None:
    model = Model()
    with (
        patch.object(DeltaRule, "hidden_map", side_effect=NotImplementedError("an operator is missing")),
        pytest.raises(NotImplementedError, match="an operator is missing"),
        regard.watch(model, regard.Received()),
    ):
        model(torch.randn(1, 9, 16))


@pytest.mark.parametrize("gradients", [True, False])
def test_inputs_are_projected_once(gradients: bool) -> None:
    mixer, x = DeltaRule(16, heads=2), torch.randn(2, 9, 16)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    calls: list[int] = []
    mixer.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(gradients):
        plain, _ = mixer(x, mask=mask)
        with regard.watch(mixer, regard.Received(), regard.TopK(2)):
            found, _ = mixer(x, mask=mask)
    assert len(calls) == 2  # of the plain call, and of the watched one
    assert torch.equal(found, plain)
    if gradients:
        wanted = torch.autograd.grad(plain.square().sum(), mixer.q_proj.weight)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), mixer.q_proj.weight), wanted)


def test_a_long_text_is_still_read_in_pieces() -> None:
    mixer, x = DeltaRule(16, heads=2), torch.randn(1, 40, 16)
    with torch.no_grad(), patch.multiple("regard.mixers.mixer", _PIECE=8, _SMALLEST_PIECE=8):
        plain, _ = mixer(x)
        with regard.watch(mixer, regard.Received()) as seen:
            found, _ = mixer(x)
    torch.testing.assert_close(found, plain)
    np.testing.assert_allclose(seen.dataset().received[0], mixer.map(x).received().detach(), atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["FAST", "TaylorAttention", "LightNet", "AdaptiveFilterAttention"])
def test_both_ways_beside_padding(name: str, left: bool) -> None:
    mixer, x = KINDS[name](16, heads=2, causal=False).eval(), torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, slice(None, 3) if left else slice(-3, None)] = False
    with torch.no_grad(), regard.watch(mixer, regard.Received()) as seen:
        mixer(x, mask=mask)
    found = torch.as_tensor(seen.dataset().received.values[0])
    own = mixer.map(x[1:, mask[1]]).dense().sum(2)
    torch.testing.assert_close(found[1:, :, mask[1]], own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:1], mixer.map(x[:1]).dense().sum(2), atol=1e-5, rtol=1e-4)
    assert not found[1, :, ~mask[1]].any()
