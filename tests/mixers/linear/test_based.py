"""Based: the Taylor features, their attention, and both attentions as one layer with a state of a chosen size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.mixers import Based, TaylorAttention, taylor_attention, taylor_features
from regard.mixers.linear.based import taylor_width
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 2, 2, length, 3, generator=generator)
    v, earlier = (torch.randn(2, 2, rows, 5, generator=generator) for rows in (length, 4))
    keys = torch.randn(2, 2, 4, 3, generator=generator)
    return [q, k, v, taylor_features(keys).mT @ torch.cat([earlier, torch.ones(2, 2, 4, 1)], -1)]


def weights(q: Tensor, k: Tensor) -> Tensor:
    a = q @ k.mT / q.shape[-1] ** 0.5
    return 1 + a + a**2 / 2


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 100), st.integers(1, 70))
def test_forms_agree(length: int, chunk: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return taylor_attention(q, k, v, state, form=form, chunk=chunk)

    check_forms(run, inputs(length))


@given(st.integers(1, 20))
@settings(max_examples=10, deadline=None)
def test_features_are_the_taylor_series(width: int) -> None:
    q, k = torch.randn(2, 3, 4, width).double()
    features = taylor_features(q)
    assert features.shape[-1] == taylor_width(width)
    torch.testing.assert_close(features @ taylor_features(k).mT, weights(q, k))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(form: str, causal: bool) -> None:
    q, k, v, _ = inputs(40)
    matrix = weights(q, k)
    matrix = matrix.tril() if causal else matrix
    found, _ = taylor_attention(q, k, v, causal=causal, form=form, chunk=16)
    torch.testing.assert_close(found, matrix / matrix.sum(-1, keepdim=True) @ v, atol=1e-4, rtol=1e-4)


def test_a_state_is_the_tokens_before() -> None:
    q, k, v, _ = inputs(30)
    whole, after = taylor_attention(q, k, v)
    _, state = taylor_attention(q[:, :, :11], k[:, :, :11], v[:, :, :11])
    rest, again = taylor_attention(q[:, :, 11:], k[:, :, 11:], v[:, :, 11:], state)
    torch.testing.assert_close(rest, whole[:, :, 11:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, after, atol=1e-5, rtol=1e-4)


def test_small_logits_give_softmax_attention() -> None:
    q, k, v, _ = inputs(30)
    expected = torch.nn.functional.scaled_dot_product_attention(q * 0.03, k, v, is_causal=True)
    torch.testing.assert_close(taylor_attention(q * 0.03, k, v)[0], expected, atol=1e-3, rtol=0)


def test_half_precision() -> None:
    q, k, v, _ = inputs(100)
    expected, _ = taylor_attention(q, k, v)
    found, state = taylor_attention(*(tensor.bfloat16() for tensor in (q, k, v)))
    assert (found.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_gradients_with_padding_are_finite() -> None:
    mixer, x = Based(8, heads=2, features=3, window=4), torch.randn(2, 9, 8, requires_grad=True)
    mask = torch.arange(9) >= torch.tensor([[0], [5]])
    mixer(x, mask=mask)[0].square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~mask].any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in mixer.parameters())


def test_linear_layer() -> None:
    torch.manual_seed(0)
    mixer = TaylorAttention(24, heads=3, features=5)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    hidden = mixer.map(x)
    torch.testing.assert_close(hidden.dense().sum(-1), torch.ones(2, 3, 19))
    _, state = mixer(x[:, :9])
    torch.testing.assert_close(mixer.map(x[:, 9:], state).dense(), hidden.dense()[:, :, 9:, 9:], atol=1e-5, rtol=1e-4)


def test_based_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    mixer = Based(24, heads=3, features=5, window=6)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(mixer(x)[0], mixer.linear(x)[0] + mixer.window(x)[0])
    dense = mixer.map(x).dense()
    torch.testing.assert_close(dense[:, :3], mixer.linear.map(x).dense())
    torch.testing.assert_close(dense[:, 3:], mixer.window.map(x).dense())


@pytest.mark.parametrize(("features", "window"), [(2, 1), (8, 32)])
def test_window_and_features_dial_the_state(features: int, window: int) -> None:
    mixer = Based(16, heads=2, features=features, window=window)
    numbers = (1 + features + features * (features + 1) // 2) * (16 + 2) + 2 * (window - 1) * 16
    for length in (1, 70):
        assert mixer(torch.randn(3, length, 16))[1].bytes == 4 * numbers + window - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(1, 2, 15, 4)}, r"the state must be of shape \(1, 2, 15, 5\), got \(1, 2, 15, 4\)"),
        ({"mask": torch.ones(1, 5)}, r"mask must be boolean, of shape \(1, 5\), got torch.float32 \(1, 5\)"),
        ({"key": torch.randn(1, 2, 5, 3)}, r"query and key must be of one shape"),
    ],
)
def test_bad_inputs(change: dict[str, Tensor], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        taylor_attention(**({"query": q, "key": k, "value": v} | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"TaylorAttention: features must be at least 1, got 0"):
        TaylorAttention(8, heads=2, features=0)
    with pytest.raises(ValueError, match=r"dim must be a multiple of heads, got dim=10 and heads=4"):
        Based(10, heads=4)
    with pytest.raises(ValueError, match=r"there are no dimensions to take features of: x is of shape \(2, 0\)"):
        taylor_features(torch.zeros(2, 0))
