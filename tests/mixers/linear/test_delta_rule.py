"""The delta rule, plain and gated: forms, layers, and what it is for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from regard.mixers import DeltaRule, GatedDeltaRule, delta_rule
from tests.mixers.contract import check_forms, check_mixer


def inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, 2, 3, length, 4, generator=generator)
    v, state = (torch.randn(2, 3, rows, 5, generator=generator) for rows in (length, 4))
    beta, decay = torch.rand(2, 2, 3, length, generator=generator)
    return [q, normalize(k, dim=-1), v, beta, state, -decay]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 150), st.booleans(), st.integers(1, 70))
def test_forms_agree(length: int, gated: bool, chunk: int) -> None:
    def run(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, decay: Tensor, form: str
    ) -> tuple[Tensor, Tensor]:
        return delta_rule(q, k, v, beta, state, log_decay=decay if gated else None, form=form, chunk=chunk)

    check_forms(run, inputs(length))


def test_definition() -> None:
    q, k, v, beta, state, decay = (tensor.double() for tensor in inputs(9))
    expected = []
    for i in range(9):
        kk = k[:, :, i, :, None] * k[:, :, i, None]
        keep = torch.eye(4).double() - beta[:, :, i, None, None] * kk
        state = decay[:, :, i, None, None].exp() * keep @ state
        state = state + beta[:, :, i, None, None] * k[:, :, i, :, None] * v[:, :, i, None]
        expected.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, i]))
    found, after = delta_rule(q, k, v, beta, inputs(9)[4].double(), log_decay=decay, chunk=4)
    torch.testing.assert_close(found, torch.stack(expected, 2))
    torch.testing.assert_close(after, state)


def test_a_key_written_again_gives_its_new_value() -> None:
    keys = torch.eye(4)[[0, 1, 2, 0, 3]][None, None]
    values = torch.arange(5.0)[None, None, :, None]
    output, _ = delta_rule(keys[:, :, [0, 1, 2, 0, 0]], keys, values, torch.ones(1, 1, 5))
    assert output[0, 0, :, 0].tolist() == [0, 1, 2, 3, 3]


def test_half_precision() -> None:
    q, k, v, beta, _, decay = inputs(100)
    expected, _ = delta_rule(q, k, v, beta, log_decay=decay)
    found, _ = delta_rule(*(t.bfloat16() for t in (q, k, v, beta)), log_decay=decay.bfloat16())
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


@pytest.mark.parametrize("kind", [DeltaRule, GatedDeltaRule])
def test_layer(kind: type[DeltaRule]) -> None:
    torch.manual_seed(0)
    mixer = kind(24, heads=3)
    check_mixer(mixer)


CHOICES: list[tuple[type[DeltaRule], dict[str, Any]]] = [
    (DeltaRule, {"head_dim": 6, "expand_v": 1.5, "use_gate": True, "conv_bias": True}),
    (DeltaRule, {"qk_norm": "sum", "qk_activation": "elu", "use_beta": False}),
    (DeltaRule, {"use_short_conv": False, "qk_activation": "relu", "allow_neg_eigval": True}),
    (DeltaRule, {"qk_activation": "identity", "conv_size": 2}),
    (GatedDeltaRule, {"num_v_heads": 6, "head_dim": 5, "expand_v": 2.0, "allow_neg_eigval": True}),
    (GatedDeltaRule, {"use_gate": False, "use_short_conv": False}),
]


@pytest.mark.parametrize(("kind", "choices"), CHOICES)
def test_layers_of_other_choices(kind: type[DeltaRule], choices: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = kind(24, heads=3, **choices)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    check_mixer(mixer)


def test_more_heads_of_values_than_of_keys() -> None:
    """Neighbouring heads of values share a query and a key: the same as with these repeated."""
    torch.manual_seed(0)
    shared, alone = GatedDeltaRule(24, 2, num_v_heads=6, head_dim=4), GatedDeltaRule(24, 6, head_dim=4)
    weights, taps = shared.state_dict(), shared.conv1d.weight.split([8, 8, 24])
    for name in ("q_proj.weight", "k_proj.weight"):
        weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    repeated = [tap.unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1) for tap in taps[:2]]
    alone.load_state_dict(weights | {"conv1d.weight": torch.cat([*repeated, taps[2]])})
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(shared(x)[0], alone(x)[0], atol=1e-5, rtol=1e-4)


def test_beta_reaches_2_where_eigenvalues_may_be_negative() -> None:
    mixer, x = DeltaRule(8, heads=2, allow_neg_eigval=True), torch.randn(1, 5, 8)
    torch.testing.assert_close(mixer.project(x)["beta"], 2 * mixer.b_proj(x).sigmoid().mT)
    assert (DeltaRule(8, heads=2, use_beta=False).project(x)["beta"] == 1).all()


def test_decays_near_1_differ_in_half_precision() -> None:
    """A head that forgets little is none that forgets nothing: what its decay is made of is not rounded to bfloat16."""
    mixer, x = GatedDeltaRule(8, heads=2), torch.zeros(1, 1, 8)
    with torch.no_grad():
        mixer.A_log.fill_(0.0)
        mixer.dt_bias.copy_(torch.tensor([-9.0, -8.0]))
    found = mixer.bfloat16().project(x.bfloat16())["log_decay"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, :, 0], -torch.tensor([-9.0, -8.0]).exp().log1p())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.zeros(1, 2, 4)}, r"beta must be of shape \(1, 2, 5\), got \(1, 2, 4\)"),
        ({"log_decay": torch.zeros(2)}, r"log_decay must be of shape \(1, 2, 5\), got \(2,\)"),
        ({"state": torch.zeros(1, 2, 3, 4)}, r"the state must be of shape \(1, 2, 4, 4\), got \(1, 2, 3, 4\)"),
    ],
)
def test_bad_inputs(change: dict[str, Tensor], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        delta_rule(**({"query": q, "key": k, "value": v, "beta": torch.ones(1, 2, 5)} | change))


def test_bad_layers_and_states() -> None:
    with pytest.raises(ValueError, match=r"DeltaRule: dim must be a multiple of heads, got dim=10 and heads=4"):
        DeltaRule(10, heads=4)
    with pytest.raises(ValueError, match=r"DeltaRule: num_v_heads must be a multiple of heads, got 3 and 2"):
        DeltaRule(8, heads=2, num_v_heads=3)
    with pytest.raises(ValueError, match=r"there is no 'l1' of queries and keys; known are l2, sum"):
        DeltaRule(8, heads=2, qk_norm="l1")
    with pytest.raises(ValueError, match=r"a width of 4, expanded 1.3 times, must be a multiple of 1, got 5.2"):
        DeltaRule(8, heads=2, expand_v=1.3)
    mixer, x = DeltaRule(8, heads=2), torch.randn(2, 5, 8)
    _, other = GatedDeltaRule(8, heads=2)(x)
    with pytest.raises(ValueError, match=r"DeltaRule goes on from a state of its own, got a state of GatedDeltaRule"):
        mixer(x, other)
    _, state = mixer(x)
    with pytest.raises(ValueError, match=r"was given 1 texts, and a state of 2"):
        mixer(x[:1], state)
    with pytest.raises(
        ValueError, match=r"takes x of shape \(batch, tokens, 8\), at least one of each, got \(2, 5, 7\)"
    ):
        mixer(x[..., :7])
    with pytest.raises(ValueError, match=r"takes a boolean mask of shape \(2, 5\), got torch.float32 \(2, 5\)"):
        mixer(x, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"decode takes one token, \(batch, dim\), got \(2, 5, 8\)"):
        mixer.decode(x, state)
