"""The delta rule, plain and gated: forms, layers, and what it is for."""

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
    with pytest.raises(ValueError, match=r"takes a boolean mask of shape \(2, 5\), got torch.int64 \(2, 5\)"):
        mixer(x, mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"decode takes one token, \(batch, dim\), got \(2, 5, 8\)"):
        mixer.decode(x, state)
