"""What one block measures is no other's, and what cannot be given is refused."""

from collections.abc import Callable

import pytest
import torch
import xarray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard.watch import recording


@pytest.fixture
def module() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True).eval()


X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [regard.Received, lambda: regard.Mass({"all": slice(0, 5)}), regard.ValueNorm])
def test_one_statistic_in_two_blocks(module: nn.Module, make: Callable[[], regard.Statistic]) -> None:
    """Each with a mask of its own."""
    one, other, both = torch.ones(1, 5), torch.tensor([[1, 1, 1, 0, 0]]), make()
    alone = []
    with torch.no_grad():
        for mask in (one, other):
            with regard.watch(module, make(), token_mask=mask) as seen:
                module(X, X, X)
            alone.append(seen.dataset())
        with regard.watch(module, both, token_mask=one) as outer, regard.watch(module, both, token_mask=other) as inner:
            module(X, X, X)
    xarray.testing.assert_allclose(outer.dataset(), alone[0])
    xarray.testing.assert_allclose(inner.dataset(), alone[1])
    if isinstance(both, regard.Received):
        assert float(inner.dataset().received.sum("key")[0, 0, 0]) == pytest.approx(3)
        assert float(outer.dataset().received.sum("key")[0, 0, 0]) == pytest.approx(5)


def watching(*statistics: regard.Statistic) -> Callable[[nn.Module], object]:
    return lambda module: regard.watch(module, *statistics)


@pytest.mark.parametrize(
    "block",
    [
        watching(regard.Mass({"far": [9]})),
        watching(regard.Received(queries=[9])),
        watching(regard.Rows([9])),
        lambda module: regard.steer(module, regard.Reweight([9], 2.0)),
    ],
    ids=["Mass", "Received", "Rows", "Reweight"],
)
def test_positions_that_no_text_has(module: nn.Module, block: Callable[[nn.Module], object]) -> None:
    with pytest.raises(IndexError, match="position 9, but 5 tokens"), torch.no_grad(), block(module):  # type: ignore[attr-defined]
        module(X, X, X)


@pytest.mark.parametrize("name", ["query", "head", "segment", "layer", "pass"])
def test_names_of_dimensions_are_refused(module: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is a dimension"):
        regard.watch(module, regard.Mass({"a": [0]}, name=name))


def calls(*shapes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(shape), torch.randn(shape)) for shape in shapes]


class Layers(nn.Module):
    """Two calls of different shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.calls = calls(*shapes)

    def forward(self) -> None:
        for query, key in self.calls:
            scaled_dot_product_attention(query, key, key)


def test_layers_of_different_heads() -> None:
    model = Layers((1, 2, 6, 8), (1, 4, 6, 8))
    with regard.watch(model, regard.Entropy()) as seen:
        model()
    entropy = seen.dataset().entropy
    assert entropy.shape == (2, 1, 4, 6)
    assert entropy[0, 0].isnull().sum("query").values.tolist() == [0, 0, 6, 6]
    assert not entropy[1].isnull().any()


def test_a_dataset_of_gaps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_LARGE", 10_000)
    model = Layers((1, 16, 6, 8), (500, 1, 6, 8), (1, 1, 200, 8))
    with regard.watch(model, regard.Entropy()) as seen:
        model()
    with pytest.raises(MemoryError, match="layers="):
        seen.dataset()


def test_kept_maps_stay_what_they_were() -> None:
    """Also where the model writes over its queries and keys, as a cache of fixed size does."""
    query, key = torch.randn(2, 1, 2, 6, 8)
    expected = (query @ key.mT * 8**-0.5).softmax(-1)
    with regard.watch(regard.Entropy(), keep_maps=True) as seen:
        scaled_dot_product_attention(query, key, key)
        query.zero_()
        key.zero_()
    (kept,) = seen.maps["scaled_dot_product_attention"]
    torch.testing.assert_close(kept.dense(), expected)
