"""A mixer's map is made where somebody asks for it, once, and what goes wrong in it is told."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.mixers import DeltaRule, HiddenMap


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
    made, plain = list[int](), DeltaRule.map

    def map_of(self: DeltaRule, *arguments: Any) -> HiddenMap:
        made.append(list(model.layers).index(self))
        return plain(self, *arguments)

    with patch.object(DeltaRule, "map", map_of), torch.no_grad(), block:
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
        patch.object(DeltaRule, "map", side_effect=NotImplementedError("an operator is missing")),
        pytest.raises(NotImplementedError, match="an operator is missing"),
        regard.watch(model, regard.Received()),
    ):
        model(torch.randn(1, 9, 16))


def test_both_ways_beside_padding_is_refused() -> None:
    mixer, x = regard.mixers.FAST(16, heads=2, causal=False), torch.randn(1, 9, 16)
    mask = torch.arange(9)[None] > 2
    with (
        pytest.raises(ValueError, match=r"FAST\(causal=False\) is watched without padding only"),
        regard.watch(mixer, regard.Received()),
    ):
        mixer(x, mask=mask)
    with torch.no_grad(), regard.watch(mixer, regard.Received()) as seen:
        mixer(x)
    torch.testing.assert_close(
        torch.as_tensor(seen.dataset().received.values[0]), mixer.map(x).dense().sum(2), atol=1e-5, rtol=1e-4
    )
