"""Adaptive filter attention: its precision, its definition, its limit, and its layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.mixers import AdaptiveFilterAttention, adaptive_filter_attention
from regard.mixers.mixer import heads_of, join_heads
from regard.mixers.softmax.adaptive_filter import Dynamics, diagonal_filter_attention
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int, before: int = 0) -> list[Tensor]:
    """Queries, keys, values, the state's keys and values, and the seven parameters of 3 heads of 4 pairs."""
    generator = torch.Generator().manual_seed(length)
    tensors = torch.randn(3, 2, 3, length, 8, generator=generator)
    state = torch.randn(2, 2, 3, before, 8, generator=generator)
    parameters = 0.2 + torch.rand(6, 3, generator=generator)
    frequency = 3 * torch.rand(3, 4, generator=generator)
    return [*tensors, *state, 0.3 * parameters[0], frequency, *parameters[1:4], 3 * parameters[4], parameters[5]]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 20), st.booleans(), st.integers(1, 40), st.integers(1, 40))
def test_forms_agree(length: int, before: int, causal: bool, query_chunk: int, key_chunk: int) -> None:
    def run(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *parameters: Tensor, form: str
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = (keys, values) if before and causal else None
        return adaptive_filter_attention(
            q, k, v, Dynamics(*parameters), state, causal=causal, form=form, query_chunk=query_chunk, key_chunk=key_chunk
        )  # fmt: skip

    check_forms(run, inputs(length, before))


@pytest.mark.parametrize("causal", [True, False])
def test_definition(causal: bool) -> None:
    q, k, v, _, _, *parameters = (tensor.double() for tensor in inputs(12))
    model = Dynamics(*parameters)
    expected = torch.zeros_like(v)
    complex_of = [torch.complex(tensor[..., :4], tensor[..., 4:]) for tensor in (q, k, v)]
    for head in range(3):
        decay, frequency, process, key_noise, query_noise, freedom, sharpness = (p[head] for p in model)
        for i in range(12):
            keys = list(range(i + 1 if causal else 12))
            lag = torch.tensor([abs(i - j) for j in keys]).double()
            turn = torch.tensor([i - j for j in keys]).double()[:, None] * frequency
            moved = torch.polar((-decay * lag)[:, None].exp().expand_as(turn), turn)
            variance = process * (1 - (-2 * decay * lag).exp()) / (2 * decay)
            variance = variance + key_noise * (-2 * decay * lag).exp() + query_noise
            residual = complex_of[0][:, head, i, None] - moved * complex_of[1][:, head, keys]
            robust = (1 + residual.abs().square().sum(-1) / (freedom * 4 * variance)) ** -(1 + freedom)
            weights = (robust / variance) ** sharpness
            weights = weights / weights.sum(-1, keepdim=True)
            mixed = (weights[..., None] * moved * complex_of[2][:, head, keys]).sum(1)
            expected[:, head, i] = torch.cat([mixed.real, mixed.imag], -1)
    found, _ = adaptive_filter_attention(q, k, v, model, causal=causal, query_chunk=5, key_chunk=3)
    torch.testing.assert_close(found, expected)


def test_variance_solves_the_lyapunov_equation() -> None:
    model = Dynamics(*(tensor.double() for tensor in inputs(1)[5:]))
    decay, _, process, key_noise, query_noise, _, _ = model
    variance, step = key_noise, 1e-4
    for _ in range(20_000):
        middle = variance + step / 2 * (process - 2 * decay * variance)
        variance = variance + step * (process - 2 * decay * middle)
    torch.testing.assert_close(model.variance(torch.tensor(2.0).double()), variance + query_noise, rtol=1e-6, atol=0)
    slow = model._replace(decay=torch.full((3,), 1e-12).double()).variance(torch.tensor(7.0).double())
    torch.testing.assert_close(slow, 7 * process + key_noise + query_noise)


def test_without_dynamics_it_is_softmax_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 8, generator=generator).double()
    k = torch.nn.functional.normalize(k, dim=-1)
    one = torch.ones(2).double()
    # V = 2, and ν so large that the weight is Gaussian: ℓ = 2 q·k / (d V) and what does not depend on j
    still = Dynamics(1e-12 * one, torch.zeros(2, 4).double(), 1e-12 * one, one, one, 1e7 * one, one)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=2 / (4 * 2))
    torch.testing.assert_close(adaptive_filter_attention(q, k, v, still)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_diagonal_variant_of_equal_pairs_is_the_isotropic_one(causal: bool) -> None:
    q, k, v, _, _, *parameters = (tensor.double() for tensor in inputs(14))
    model = Dynamics(*parameters)
    each = {
        name: getattr(model, name)[:, None].expand(3, 4) for name in ("decay", "process", "key_noise", "query_noise")
    }
    expected, _ = adaptive_filter_attention(q, k, v, model, causal=causal)
    torch.testing.assert_close(diagonal_filter_attention(q, k, v, model._replace(**each), causal=causal), expected)


def test_half_precision() -> None:
    q, k, v, _, _, *parameters = inputs(50)
    expected, _ = adaptive_filter_attention(q, k, v, Dynamics(*parameters))
    found, _ = adaptive_filter_attention(*(tensor.bfloat16() for tensor in (q, k, v)), Dynamics(*parameters))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_layer() -> None:
    torch.manual_seed(0)
    mixer = AdaptiveFilterAttention(24, heads=3, query_chunk=5, key_chunk=4)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    hidden = mixer.map(x)
    torch.testing.assert_close(hidden.received(), hidden.dense().sum(2), atol=1e-5, rtol=1e-4)
    _, state = mixer(x[:, :9])
    torch.testing.assert_close(mixer.map(x[:, 9:], state).dense(), hidden.dense()[:, :, 9:], atol=1e-5, rtol=1e-4)


def test_the_layer_is_the_function_and_a_gate() -> None:
    torch.manual_seed(0)
    mixer, x = AdaptiveFilterAttention(16, heads=2), torch.randn(1, 11, 16)
    q, k, v = heads_of(x, 2, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    filtered, _ = adaptive_filter_attention(q, k, v, mixer.dynamics, form="parallel")
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(join_heads((filtered + v) / 2)), atol=1e-5, rtol=1e-4)


def test_masked_keys_are_as_if_they_were_not_there() -> None:
    q, k, v, _, _, *parameters = inputs(10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, [2, 3, 6]] = False
    found, _ = adaptive_filter_attention(q, k, v, Dynamics(*parameters), mask=mask)
    left = (tensor[:, :, mask[0]] for tensor in (q, k, v))
    torch.testing.assert_close(found[:, :, mask[0]], adaptive_filter_attention(*left, Dynamics(*parameters))[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.randn(1, 3, 5, 4)}, r"of one shape with an even last.*values of \(1, 3, 5, 4\)"),
        ({"dynamics": {"decay": torch.ones(2)}}, r"dynamics.decay must be of shape \(3,\), got \(2,\)"),
        ({"dynamics": {"frequency": torch.ones(4)}}, r"dynamics.frequency must be of shape \(3, 4\), got \(4,\)"),
        ({"state": torch.ones(2, 1, 2, 5, 8)}, r"state's keys and values must be of shape \(1, 3, 5, 8\), got \(1, 2"),
        ({"state": torch.ones(2, 1, 3, 5, 8), "causal": False}, r"without causal=True there is no state"),
        ({"mask": torch.ones(1, 4)}, r"mask must be boolean, of shape \(1, 5\), got torch.float32 \(1, 4\)"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 3, 5, 8)
    model = Dynamics(*inputs(1)[5:])._replace(**change.pop("dynamics", {}))
    with pytest.raises(ValueError, match=message):
        adaptive_filter_attention(**({"query": q, "key": k, "value": v, "dynamics": model} | change))


def test_odd_head_dimensions() -> None:
    with pytest.raises(ValueError, match=r"with an even last dimension, got \(1, 3, 5, 7\)"):
        adaptive_filter_attention(*torch.randn(3, 1, 3, 5, 7), Dynamics(*inputs(1)[5:]))
    with pytest.raises(
        ValueError, match=r"AdaptiveFilterAttention: .*even head dimension; dim=12 and heads=4 make it 3"
    ):
        AdaptiveFilterAttention(12, heads=4)
