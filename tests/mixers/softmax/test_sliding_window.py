"""Sliding-window attention: its forms, its state, and softmax attention under a band."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.mixers import SlidingWindow, WindowState, sliding_window_attention
from regard.mixers.rotary import rotary_rates, rotate
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int, window: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(length, 4), (length, 4), (length, 5), (window - 1, 4), (window - 1, 5)]
    return [torch.randn(2, 3, *size, generator=generator) for size in sizes]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.sampled_from([None, 1, 7, 32]), st.sampled_from([None, 100.0]))
def test_forms_agree(length: int, window: int, chunk: int | None, rotary: float | None) -> None:
    real = torch.arange(window - 1) >= torch.tensor([[0], [window // 2]])

    def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, form: str) -> tuple[Tensor, WindowState]:
        state = WindowState(keys, values, real)
        return sliding_window_attention(q, k, v, window, state, rotary=rotary, form=form, chunk=chunk)

    check_forms(run, inputs(length, window))


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(form: str) -> None:
    q, k, v, keys, values = (tensor.double() for tensor in inputs(50, 9))
    joined = torch.cat([keys, k], 2)
    distance = torch.arange(8, 58)[:, None] - torch.arange(58)
    band = (distance >= 0) & (distance < 9)
    rates = rotary_rates(4, 100.0)
    # From wherever one counts: distances alone matter.
    turned = rotate(q, torch.arange(31, 81)[None], rates), rotate(joined, torch.arange(23, 81)[None], rates)
    expected = scaled_dot_product_attention(*turned, torch.cat([values, v], 2), attn_mask=band)
    state = WindowState(keys, values, torch.ones(2, 8, dtype=torch.bool))
    found, after = sliding_window_attention(q, k, v, 9, state, rotary=100.0, form=form)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after.key, k[:, :, -8:])
    torch.testing.assert_close(after.value, v[:, :, -8:])


def test_a_window_of_all_tokens_is_causal_attention() -> None:
    q, k, v, *_ = inputs(30, 1)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(sliding_window_attention(q, k, v, 64)[0], expected)


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_padding_after_a_state(form: str) -> None:
    q, k, v, *_ = inputs(40, 1)
    _, state = sliding_window_attention(*(tensor[:, :, :12] for tensor in (q, k, v)), 6)
    mask = torch.arange(28) >= torch.tensor([[0], [9]])
    late = [tensor[:, :, 12:] * mask[:, None, :, None] for tensor in (q, k, v)]
    found, after = sliding_window_attention(*late, 6, state, mask, rotary=50.0, form=form, chunk=7)
    joined = [torch.cat([tensor[1:, :, :12], tensor[1:, :, 21:]], 2) for tensor in (q, k, v)]
    expected, own = sliding_window_attention(*joined, 6, rotary=50.0)
    torch.testing.assert_close(found[1:, :, 9:], expected[:, :, 12:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after.key[1:], own.key)


def test_half_precision() -> None:
    q, k, v, *_ = inputs(100, 1)
    expected, _ = sliding_window_attention(q, k, v, 16)
    found, state = sliding_window_attention(*(tensor.bfloat16() for tensor in (q, k, v)), 16)
    assert found.dtype == state.key.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("window", "rotary"), [(1, None), (8, 10_000.0), (100, 10_000.0)])
def test_layer(window: int, rotary: float | None) -> None:
    torch.manual_seed(0)
    mixer = SlidingWindow(24, heads=3, window=window, rotary=rotary)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    hidden = mixer.map(x)
    dense = hidden.dense()
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 3, 19))
    assert not dense.tril(-window).any()
    torch.testing.assert_close(hidden.received(), dense.sum(2))


def test_the_map_after_a_state_leaves_out_what_came_before() -> None:
    mixer, x = SlidingWindow(8, heads=2, window=6), torch.randn(1, 20, 8)
    _, state = mixer(x[:, :12])
    torch.testing.assert_close(mixer.map(x[:, 12:], state).dense(), mixer.map(x).dense()[:, :, 12:, 12:])


def test_the_state_is_of_one_size() -> None:
    mixer = SlidingWindow(8, heads=2, window=6)
    states = [mixer(torch.randn(1, length, 8))[1] for length in (1, 5, 40)]
    assert {state.bytes for state in states} == {2 * 5 * 8 * 4 + 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, r"window must be at least 1, got 0"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"mask must be boolean, of shape \(1, 5\), got torch.bool \(1, 4\)"),
        ({"state": WindowState(*torch.zeros(2, 1, 2, 3, 4), torch.ones(1, 3))}, r"the state must be of shapes .*window of 3"),
        ({"query": torch.zeros(1, 2, 5, 3), "key": torch.zeros(1, 2, 5, 3), "rotary": 10.0}, r"even head dimension.*5, 3"),
        ({"form": "fast"}, r"form must be one of parallel, chunked, recurrent; got 'fast'"),
    ],
)  # fmt: skip
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**({"query": q, "key": k, "value": v, "window": 3} | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"SlidingWindow: window must be at least 1, got 0"):
        SlidingWindow(8, heads=2, window=0)
    with pytest.raises(ValueError, match=r"SlidingWindow: .* even head dimension; dim=6 and heads=2 make it 3"):
        SlidingWindow(6, heads=2)
