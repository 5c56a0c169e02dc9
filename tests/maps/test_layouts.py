"""Tensors as they may lie in memory: an answer depends on their numbers alone. Found by `fuzz.maps`."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from regard import AttentionMap

LAYOUTS = {
    "columns": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


def answers(query: Tensor, key: Tensor, kernel: Literal["dense", "tiled", "fused"]) -> dict[str, Tensor]:
    attention = AttentionMap(query, key, kernel=kernel)
    product, transposed = attention @ key, attention.T @ query
    sums = {"entropy": attention.entropy(), "received": attention.received(), "logsumexp": attention.logsumexp()}
    return sums | {"product": product, "transposed": transposed}


@pytest.mark.parametrize("kernel", ["dense", "tiled", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [8, 13, 64])
def test_layouts(kernel: Literal["dense", "tiled", "fused"], layout: str, width: int) -> None:
    query, key = torch.randn(1, 2, 40, width), torch.randn(1, 2, 5, width)
    expected = answers(query, key, kernel)
    found = answers(LAYOUTS[layout](query), LAYOUTS[layout](key), kernel)
    for name, answer in expected.items():
        torch.testing.assert_close(found[name], answer, msg=lambda text, name=name: f"{name}: {text}")
