"""The selective state space: its recurrence, its forms, and its layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from regard.mixers import SelectiveSSM, selective_scan
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int) -> list[Tensor]:
    """x, step, rate, into, out, state: 2 texts, 2 groups of 3 channels, 4 states."""
    generator = torch.Generator().manual_seed(length)
    x, step = torch.randn(2, 2, 2, length, 3, generator=generator)
    into, out = torch.randn(2, 2, 2, length, 4, generator=generator)
    rate = 3 * torch.rand(2, 3, 4, generator=generator)
    return [x, functional.softplus(step), rate, into, out, torch.randn(2, 2, 3, 4, generator=generator)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40))
def test_forms_agree(length: int, chunk: int) -> None:
    def run(*tensors: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return selective_scan(*tensors, form=form, chunk=chunk)

    check_forms(run, inputs(length))


def test_gradients_can_be_differentiated() -> None:
    """The backward pass is written by hand: autograd's numbers, once and twice."""
    small = [tensor[:, :, :7].double().requires_grad_() for tensor in inputs(7)]
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan(*tensors, chunk=3), small)
    assert torch.autograd.gradgradcheck(lambda *tensors: selective_scan(*tensors, chunk=3), small)


def test_definition() -> None:
    x, step, rate, into, out, state = (tensor.double() for tensor in inputs(9))
    expected, h = [], state
    for i in range(9):
        h = torch.exp(-step[:, :, i, :, None] * rate) * h
        h = h + (step * x)[:, :, i, :, None] * into[:, :, i, None]
        expected.append((h * out[:, :, i, None]).sum(-1))
    found, after = selective_scan(x, step, rate, into, out, state, chunk=4)
    torch.testing.assert_close(found, torch.stack(expected, 2))
    torch.testing.assert_close(after, h)


def test_strong_decays_stay_finite() -> None:
    x, _, rate, into, out, _ = inputs(200)
    step = torch.full_like(x, 1000.0).requires_grad_()
    y, _ = selective_scan(x, step, rate, into, out)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(step.grad).all()
    expected = 1000.0 * x * (into * out).sum(-1, keepdim=True)
    torch.testing.assert_close(y[:, :, 50:].detach(), expected[:, :, 50:], rtol=1e-3, atol=1.0)


def test_half_precision() -> None:
    x, step, rate, into, out, _ = inputs(100)
    expected, _ = selective_scan(x, step, rate, into, out)
    found, state = selective_scan(*(tensor.bfloat16() for tensor in (x, step, rate, into, out)))
    assert (found.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_layer() -> None:
    torch.manual_seed(0)
    mixer = SelectiveSSM(12, state_size=5, use_bias=True)
    check_mixer(mixer)
    x = torch.randn(2, 19, 12)
    hidden = mixer.map(x)
    torch.testing.assert_close(mixer.system(x).matrix().float(), hidden.dense(), atol=1e-5, rtol=1e-4)
    _, state = mixer(x[:, :9])
    torch.testing.assert_close(mixer.map(x[:, 9:], state).dense(), hidden.dense()[:, :, 9:, 9:], atol=1e-5, rtol=1e-4)


def test_initialisation() -> None:
    mixer = SelectiveSSM(64, state_size=4)
    assert mixer.A_log.exp()[7].tolist() == pytest.approx([1, 2, 3, 4])
    step = functional.softplus(mixer.dt_proj.bias.detach())
    assert 1e-3 <= float(step.min()) <= float(step.max()) <= 0.1001
    assert mixer.time_step_rank == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 3)}, r"x must be \(batch, heads, tokens, dim\) with tokens, got \(2, 5, 3\)"),
        ({"step": torch.zeros(1, 2, 5, 1)}, r"step must be of shape \(1, 2, 5, 3\), got \(1, 2, 5, 1\)"),
        ({"rate": torch.zeros(3, 4)}, r"rate must be of shape \(2, 3, states\), got \(3, 4\)"),
        ({"into": torch.zeros(1, 2, 5, 3)}, r"into must be of shape \(1, 2, 5, 4\), got \(1, 2, 5, 3\)"),
        ({"state": torch.zeros(1, 2, 4, 3)}, r"the state must be of shape \(1, 2, 3, 4\), got \(1, 2, 4, 3\)"),
        ({"chunk": 0}, r"chunk must be at least 1, got 0"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    x = torch.zeros(1, 2, 5, 3)
    good = {"x": x, "step": x, "rate": torch.zeros(2, 3, 4), "into": torch.zeros(1, 2, 5, 4)}
    good["out"] = good["into"]
    with pytest.raises(ValueError, match=message):
        selective_scan(**(good | change))


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"SelectiveSSM: state_size must be at least 1, got 0"):
        SelectiveSSM(8, state_size=0)
