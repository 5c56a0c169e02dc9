"""CHELA, and the long convolution on which it and LongVQ stand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, pad

from regard.mixers import CHELA, LongConvolution, long_convolution
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    x, state = (torch.randn(2, *size, generator=generator) for size in ((length, 3), (3, 4)))
    return [x, -torch.rand(3, 4, generator=generator), torch.randn(3, 4, generator=generator), state]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.integers(1, 70), st.booleans())
def test_forms_agree(length: int, chunk: int, padded: bool) -> None:
    mask = torch.arange(length) >= torch.tensor([[0], [length // 3]]) if padded else None

    def run(x: Tensor, decay: Tensor, weight: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        output, after = long_convolution(x, decay, weight, state, mask, form=form, chunk=chunk)
        return output if mask is None else output * mask[..., None], after

    check_forms(run, inputs(length))


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(form: str) -> None:
    x, decay, weight, state = (tensor.double() for tensor in inputs(40))
    expected, after = [], state
    for i in range(40):
        after = decay.exp() * after + x[:, i, :, None]
        expected.append((weight * after).sum(-1))
    found, end = long_convolution(x, decay, weight, state, form=form, chunk=16)
    torch.testing.assert_close(found, torch.stack(expected, 1))
    torch.testing.assert_close(end, after)


def test_padding_leaves_the_state_as_it_is() -> None:
    x, decay, weight, state = inputs(20)
    mask = torch.arange(20) >= torch.tensor([[20], [13]])
    found, after = long_convolution(x, decay, weight, state, mask, chunk=8)
    alone, own = long_convolution(x[1:, 13:], decay, weight, state[1:], chunk=8)
    torch.testing.assert_close(after[0], state[0])
    torch.testing.assert_close(after[1], own[0])
    torch.testing.assert_close(found[1, 13:], alone[0])


def test_branches_merge_into_one_kernel() -> None:
    layer, x = LongConvolution(3), torch.randn(2, 90, 3)
    kernel = layer.kernel(90)
    expected = conv1d(pad(x.mT, (89, 0)), kernel.flip(-1)[:, None], groups=3).mT
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.kernel(200)[:, :90], kernel)


def test_kernels_of_any_text_are_bounded() -> None:
    layer = LongConvolution(16)
    total = layer.kernel(20_000).abs().sum(1)
    assert bool((total <= 1 + layer.weight.abs().sum(1) / 8**0.5 + 1e-3).all())


def test_half_precision() -> None:
    x, decay, weight, _ = inputs(100)
    expected, _ = long_convolution(x, decay, weight)
    found, state = long_convolution(*(tensor.bfloat16() for tensor in (x, decay, weight)))
    assert (found.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_layer() -> None:
    torch.manual_seed(0)
    mixer = CHELA(24, heads=3)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    parts, hidden = mixer.project(x), mixer.map(x)
    torch.testing.assert_close(hidden.dense(), (parts["query"] @ parts["key"].mT).tril(), atol=1e-5, rtol=1e-4)


def test_the_state_is_of_one_size() -> None:
    mixer = CHELA(16, heads=2, convolution=3, exponentials=5)
    for length in (1, 70):
        assert mixer(torch.randn(3, length, 16))[1].bytes == 4 * (16 * 16 // 2 + (5 + 2) * 16)


def test_padding_and_a_state_together() -> None:
    mixer, x = CHELA(16, heads=2).eval(), torch.randn(2, 30, 16)
    _, state = mixer(x[:, :10])
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    found, _ = mixer(x[:, 10:], state, mask)
    joined, _ = mixer(torch.cat([x[1:, :10], x[1:, 16:]], 1))
    torch.testing.assert_close(found[1, 6:], joined[0, 10:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(batch, tokens, dim\), of one token at least, got \(2, 3\)"),
        ({"weight": torch.zeros(3, 5)}, r"must be of one shape \(3, exponentials\).*got \(3, 4\), \(3, 5\)"),
        ({"state": torch.zeros(2, 4, 3)}, r"the state must be of shape \(2, 3, 4\), got \(2, 4, 3\)"),
        ({"mask": torch.ones(2, 6)}, r"mask must be boolean, of shape \(2, 6\), got torch.float32 \(2, 6\)"),
        ({"form": "fast"}, r"form must be one of"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    x, decay, weight, _ = inputs(6)
    with pytest.raises(ValueError, match=message):
        long_convolution(**({"x": x, "log_decay": decay, "weight": weight} | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"CHELA: dim must be a multiple of heads, got dim=10 and heads=4"):
        CHELA(10, heads=4)
    with pytest.raises(ValueError, match=r"exponentials must be at least 1, got 0"):
        CHELA(8, heads=2, exponentials=0)
    with pytest.raises(ValueError, match=r"lifetime must be at least 2 tokens, got 1"):
        LongConvolution(8, lifetime=1)
