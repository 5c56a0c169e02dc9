"""FAST: the polynomial kernel, its factors, and the map that it hides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.mixers import FAST, fast_attention
from regard.mixers.linear.fast import factors, normalized
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int, order: int, width: int = 6) -> list[Tensor]:
    """Queries, keys, values, and a state as of tokens before: its denominators are positive."""
    generator = torch.Generator().manual_seed(length)
    q, k = (normalized(t, order) for t in torch.randn(2, 2, 3, length, width, generator=generator))
    v = torch.randn(2, 3, length, 5, generator=generator)
    before = normalized(torch.randn(2, 3, 7, width, generator=generator), order)
    values = torch.cat([torch.randn(2, 3, 7, 5, generator=generator), torch.ones(2, 3, 7, 1)], -1)
    return [q, k, v, factors(before, order).mT @ values]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 120), st.sampled_from([1, 2]), st.integers(1, 70))
def test_forms_agree(length: int, order: int, chunk: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return fast_attention(q, k, v, state, order=order, form=form, chunk=chunk)

    check_forms(run, inputs(length, order))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(order: int, causal: bool, form: str) -> None:
    q, k, v, _ = (tensor.double() for tensor in inputs(20, order))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 3:9] = False
    expected = torch.zeros_like(v)
    for text in range(2):
        for i in range(20):
            keys = [j for j in range(i + 1 if causal else 20) if mask[text, j]]
            scores = torch.einsum("hd,hjd->hj", q[text, :, i], k[text, :, keys])
            weights = 1 + scores + (scores**2 / 2 if order == 2 else 0)
            expected[text, :, i] = torch.einsum("hj,hjd->hd", weights / weights.sum(-1, keepdim=True), v[text, :, keys])
    found, _ = fast_attention(q, k, v, order=order, mask=mask, causal=causal, form=form, chunk=8)
    torch.testing.assert_close(found, expected)


def test_both_ways_has_gradients_in_every_form() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return fast_attention(q, k, v, causal=False, form=form)

    check_forms(run, inputs(33, 2)[:3])


@pytest.mark.parametrize("order", [1, 2])
def test_half_precision(order: int) -> None:
    q, k, v, _ = inputs(100, order, width=16)
    expected, _ = fast_attention(q, k, v, order=order)
    found, state = fast_attention(*(tensor.bfloat16() for tensor in (q, k, v)), order=order)
    assert (found.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


@pytest.mark.parametrize("order", [1, 2])
def test_normalisation_bounds_the_products(order: int) -> None:
    q, k = (normalized(tensor, order) for tensor in torch.randn(2, 100, 16))
    bound = 1 if order == 1 else 4
    assert float((q @ k.mT).abs().max()) <= bound + 1e-4
    assert float(((q * q).sum(-1) - bound).abs().max()) < 1e-2


@pytest.mark.parametrize("rotary", [10_000.0, None])
@pytest.mark.parametrize("order", [1, 2])
def test_layer(order: int, rotary: float | None) -> None:
    torch.manual_seed(0)
    mixer = FAST(24, heads=3, order=order, rotary=rotary)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    hidden = mixer.map(x)
    torch.testing.assert_close(mixer.system(x).matrix().float(), hidden.dense(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden.received(), hidden.dense().sum(2), atol=1e-4, rtol=1e-4)
    _, state = mixer(x[:, :9])
    torch.testing.assert_close(mixer.map(x[:, 9:], state).dense(), hidden.dense()[:, :, 9:, 9:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 3}, r"order must be 1 or 2, got 3"),
        ({"chunk": 0}, r"chunk must be at least 1, got 0"),
        ({"key": torch.randn(1, 2, 5, 3)}, r"query and key must be of one shape.*\(1, 2, 5, 4\), \(1, 2, 5, 3\)"),
        ({"mask": torch.ones(5)}, r"mask must be boolean, of shape \(1, 5\), got torch.float32 \(5,\)"),
        ({"state": torch.zeros(1, 2, 4, 4)}, r"the state must be of shape \(1, 2, 15, 5\), got \(1, 2, 4, 4\)"),
        ({"state": torch.zeros(1, 2, 15, 5), "causal": False}, r"without causal=True there is no state"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        fast_attention(**({"query": q, "key": k, "value": v} | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"FAST: order must be 1 or 2, got 0"):
        FAST(8, heads=2, order=0)
    with pytest.raises(ValueError, match=r"FAST: .*even head dimension; dim=12 and heads=4 make it 3"):
        FAST(12, heads=4)
