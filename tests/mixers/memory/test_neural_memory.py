"""Neural memory: its forms, its definition, the mechanisms that it contains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from regard.mixers import (
    KL,
    Decay,
    DotProduct,
    Huber,
    Lp,
    Lq,
    Memory,
    delta_rule,
    linear_attention,
    neural_memory,
)
from regard.mixers.memory.choices import Bias, Retention
from regard.mixers.memory.network import slopes
from tests.mixers.contract import check_forms

CASES: dict[str, tuple[Bias, Retention, bool, int]] = {
    "matrix": (Lp(2), Decay(), True, 1),
    "network": (Lp(2), Decay(), True, 2),
    "plain descent": (Lp(2), Decay(), False, 2),
    "deeper": (Lp(2), Decay(), True, 3),
    "Moneta": (Lp(3), Lq(4), False, 2),
    "Yaad": (Huber(), Decay(), False, 2),
    "Memora": (Lp(2), KL(), False, 2),
    "Lq of a matrix, with momentum": (Lp(1.5), Lq(2.5), True, 1),
}


def inputs(length: int, retention: Retention, depth: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = normalize(torch.randn(3, 2, 2, length, 8, generator=generator), dim=-1)
    step, decay, momentum = torch.rand(3, 2, 2, length, generator=generator)
    threshold, gain = torch.rand(2, 2, length, 8, generator=generator), torch.rand(2, 8, generator=generator) + 0.5
    shapes = Memory(depth, 3).shapes(8, 8)
    weights = [retention.begin(torch.randn(2, 2, *shape, generator=generator)) for shape in shapes]
    return [q, k, v, 0.03 * step, -0.02 * decay, -momentum, threshold, gain, *weights]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=5, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 40))
def test_forms_agree(case: str, length: int, chunk: int, cut: int) -> None:
    bias, retention, momentum, depth = CASES[case]

    def run(
        q: Tensor, k: Tensor, v: Tensor, step: Tensor, decay: Tensor, eta: Tensor, threshold: Tensor, gain: Tensor,
        *weights: Tensor, form: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        outputs: list[Tensor] = []
        state: dict[str, Tensor] = {}
        for part in (slice(0, cut), slice(cut, None)):  # the state in the middle of a chunk; padding in the second part
            one = [tensor[:, :, part] for tensor in (q, k, v, step, decay, eta, threshold)]
            if not one[0].shape[2]:
                continue
            real = torch.ones(2, one[0].shape[2], dtype=torch.bool)
            real[1, 1:4], real[0, 5:] = False, part.start == 0
            output, state = neural_memory(
                *one[:4], weights, state or None, log_decay=one[4], log_momentum=one[5] if momentum else None,
                threshold=one[6], gain=gain, bias=bias, retention=retention, hidden_decay=0.3, mask=real, form=form,
                chunk=chunk,
            )  # fmt: skip
            outputs.append(output)
        return torch.cat(outputs, 2), state

    check_forms(run, inputs(length, retention, depth))


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(form: str) -> None:
    """Of a matrix: the gradient is ``(M k − v) kᵀ``, at the matrix of the chunk's start."""
    q, k, v, step, decay, momentum, _, _, matrix = (tensor.double() for tensor in inputs(11, Decay(), 1))
    start, surprise, expected = matrix, torch.zeros_like(matrix), []
    now = matrix
    for i in range(11):
        if i % 4 == 0:
            start = now
        key, value = k[:, :, i, :, None], v[:, :, i, :, None]
        gates = [gate[:, :, i, None, None] for gate in (momentum.exp(), step, decay.exp())]
        surprise = gates[0] * surprise - gates[1] * (start @ key - value) @ key.mT
        now = gates[2] * now + surprise
        expected.append((now @ q[:, :, i, :, None])[..., 0])
    found, state = neural_memory(
        q, k, v, step, [matrix], log_decay=decay, log_momentum=momentum, form=form, chunk=4
    )  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected, 2))
    torch.testing.assert_close(state["held0"], now)
    torch.testing.assert_close(state["surprise0"], surprise)
    assert state["position"].tolist() == [3, 3]


def test_one_token_a_chunk_is_the_delta_rule() -> None:
    q, k, v, step, *_, matrix = inputs(30, Decay(), 1)
    expected, after = delta_rule(q, k, v, 20 * step, matrix.mT)
    found, state = neural_memory(q, k, v, 20 * step, [matrix], chunk=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state["held0"], after.mT, atol=1e-5, rtol=1e-4)


def test_a_dot_product_is_linear_attention() -> None:
    q, k, v, _, decay, *_, matrix = inputs(30, Decay(), 1)
    expected, _ = linear_attention(q, k, v, decay, matrix.mT)
    found, _ = neural_memory(q, k, v, torch.ones(2, 2, 30), [matrix], log_decay=decay, bias=DotProduct())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [Lp(2), Lp(1), Lp(3.5), Huber(), DotProduct()])
def test_slopes_are_those_of_the_loss(bias: Bias) -> None:
    output, value = torch.randn(2, 5, 7, dtype=torch.float64)
    threshold = torch.rand(5, 7, dtype=torch.float64)
    output.requires_grad_()
    (expected,) = torch.autograd.grad(bias.loss(output, value, threshold).sum(), output)
    torch.testing.assert_close(bias.slope(output, value, threshold), expected)


def test_a_threshold_bounds_the_pull_of_an_outlier() -> None:
    key, weights = torch.ones(1, 1, 1, 1), [torch.zeros(1, 1, 1, 1)]
    pulls = []
    for size in (0.5, 10.0, 1000.0):
        value, one = torch.full((1, 1, 1, 1), size), torch.ones(1, 1, 1, 1)
        (delta, _), *_ = slopes(weights, key, value, one, one, Huber())
        pulls.append(float(delta))
    assert pulls == [-0.5, -1, -1]


def test_retentions() -> None:
    held = torch.randn(2, 3, 4, 5)
    weights = KL().weights(held, held)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 3, 4), 5.0))
    power = held.pow(4).mean((-2, -1), keepdim=True) + 1
    torch.testing.assert_close(Lq(4).weights(2 * held, held), 2 * held / power.sqrt())
    large = 20 * torch.randn(2, 3, 4, 5)  # where the floor is nothing
    begun = Lq(2.5).begin(large)
    torch.testing.assert_close(Lq(2.5).weights(begun, begun), large, rtol=1e-3, atol=1e-3)
    assert torch.equal(Lq(4).begin(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_half_precision() -> None:
    q, k, v, step, decay, momentum, _, gain, *weights = inputs(60, Decay(), 2)
    expected, _ = neural_memory(q, k, v, step, weights, log_decay=decay, log_momentum=momentum, gain=gain)
    half = [tensor.bfloat16() for tensor in (q, k, v, step, decay, momentum)]
    found, state = neural_memory(*half[:4], weights, log_decay=half[4], log_momentum=half[5], gain=gain)
    assert found.dtype == torch.bfloat16
    assert state["held0"].dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.ones(1, 2, 4)}, r"step must be of shape \(1, 2, 5\), got \(1, 2, 4\)"),
        ({"gain": torch.ones(4)}, r"gain must be of shape \(2, 4\), got \(4,\)"),
        ({"weights": [torch.ones(2, 3, 4)]}, r"weights must be .* from 4 to 4 for 1 texts .* got \(2, 3, 4\)"),
        ({"weights": []}, r"weights must be .* got none"),
        ({"state": {"held0": torch.ones(1, 2, 4, 4)}}, r"the state must be of .*'position': \(1,\).*got \{'held0'"),
        ({"chunk": 0}, r"a chunk must hold at least 1 token, got chunk=0"),
        ({"bias": Huber()}, r"the Huber bias needs a threshold"),
        ({"value": torch.ones(1, 2, 5, 3), "weights": [torch.ones(2, 8, 4), torch.ones(2, 3, 8)]}, r"got 4 and 3"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    given = {"query": q, "key": k, "value": v, "step": torch.ones(1, 2, 5), "weights": [torch.zeros(2, 4, 4)]}
    with pytest.raises(ValueError, match=message):
        neural_memory(**(given | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Memory(0), r"depth and expansion must be at least 1, got depth=0 and expansion=4"),
        (lambda: Lp(0.5), r"Lp: p must be at least 1, got 0.5"),
        (lambda: Lq(3), r"Lq: q must be at least 2, and not 3 .* got 3"),
    ],
)
def test_bad_choices(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
