"""Softmax attention as a layer: what SDPA says of whole texts, in pieces and beside padding."""

import pytest
import torch
from torch.nn import functional

from regard import AttentionMap
from regard.mixers import SoftmaxAttention
from regard.mixers.mixer import heads_of, join_heads
from regard.mixers.rotary import rotary_rates, rotate
from tests.mixers.contract import check_mixer


@pytest.mark.parametrize("rotary", [10_000.0, None])
def test_layer(rotary: float | None) -> None:
    torch.manual_seed(0)
    check_mixer(SoftmaxAttention(24, heads=3, rotary=rotary))


def test_is_plain_attention() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(24, heads=3), torch.randn(2, 15, 24)
    q, k, v = heads_of(x, 3, mixer.q_proj, mixer.k_proj, mixer.v_proj)
    angles = torch.arange(15)[:, None] / 10_000.0 ** (torch.arange(4) / 4)
    turned = [
        torch.cat(
            [t[..., :4] * angles.cos() - t[..., 4:] * angles.sin(), t[..., 4:] * angles.cos() + t[..., :4] * angles.sin()],
            -1,
        )
        for t in (q, k)
    ]  # fmt: skip
    logits = (turned[0] @ turned[1].mT / 8**0.5).masked_fill(torch.ones(15, 15).triu(1).bool(), -torch.inf)
    expected = mixer.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x)[0], expected, atol=1e-5, rtol=1e-4)


def test_map() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(24, heads=3), torch.randn(2, 15, 24)
    whole, first = mixer.map(x), mixer(x[:, :9])[1]
    rest = mixer.map(x[:, 9:], first)
    assert isinstance(whole, AttentionMap)
    torch.testing.assert_close(rest.dense(), whole.dense()[:, :, 9:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.dense().sum(-1), torch.ones(2, 3, 15))
    value = mixer.project(x).value
    torch.testing.assert_close(mixer.o_proj(join_heads(whole @ value)), mixer(x)[0], atol=1e-5, rtol=1e-4)


def test_rows_of_different_lengths_go_on_together() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(16, heads=2), torch.randn(3, 12, 16)
    masks = [torch.tensor(rows, dtype=torch.bool) for rows in (
        [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]], [[1] * 4] * 3,
    )]  # fmt: skip
    outputs, state = [], None
    for number, mask in enumerate(masks):
        part = x[:, 4 * number : 4 * number + 4]
        y, state = mixer(part, state, mask if number < 2 else None)
        outputs.append(y)
    found, real = torch.cat(outputs, 1), torch.cat(masks, 1)
    for row in range(3):
        alone, _ = mixer(x[row : row + 1, real[row]])
        torch.testing.assert_close(found[row, real[row]], alone[0], atol=1e-5, rtol=1e-4)
        assert not found[row, ~real[row]].any()
        rest = mixer.map(x[row : row + 1, :2], mixer(x[row : row + 1, real[row]])[1]).dense()
        columns = torch.cat([state.tensors["real"][row], torch.ones(2).bool()])
        both = mixer.map(x[:, :2], state).dense()[row : row + 1]
        torch.testing.assert_close(both[..., columns], rest, atol=1e-5, rtol=1e-4)


def test_half_precision() -> None:
    torch.manual_seed(0)
    mixer, x = SoftmaxAttention(24, heads=3), torch.randn(2, 15, 24)
    expected = mixer(x)[0].detach()
    found, _ = mixer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_rotation_is_exact_far_into_a_text() -> None:
    x, rates = torch.randn(1, 1, 4, 8), rotary_rates(8, 10_000.0)
    near, far = (rotate(x, torch.arange(4)[None] + start, rates) for start in (0, 1_000_000))
    torch.testing.assert_close(far @ far.mT, near @ near.mT, atol=1e-5, rtol=1e-5)
    assert rotate(x.bfloat16(), torch.arange(4)[None], rates).dtype == torch.bfloat16


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"SoftmaxAttention: dim must be a multiple of heads, got dim=10 and heads=4"):
        SoftmaxAttention(10, heads=4)
    with pytest.raises(ValueError, match=r"needs an even head dimension; dim=12 and heads=4 make it 3"):
        SoftmaxAttention(12, heads=4)
    SoftmaxAttention(12, heads=4, rotary=None)


def test_causal_calls_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(query, key, value, attn_mask=None, is_causal=False):  # type: ignore[no-untyped-def]
        calls.append((attn_mask is None, is_causal))
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    mixer = SoftmaxAttention(8, heads=2)
    _, state = mixer(torch.randn(1, 5, 8))
    mixer.decode(torch.randn(1, 8), state)
    mixer(torch.randn(1, 3, 8), state)
    assert calls == [(True, True), (True, False), (False, False)]
