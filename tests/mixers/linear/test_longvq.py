"""LongVQ: attention to quantised keys, by the codebook beyond the window, in three forms and as a layer."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.mixers import CodebookState, LongVQ, codebook_attention
from regard.mixers.linear.longvq import look_up, quantise
from tests.mixers.contract import check_forms, check_mixer

CODES = 6


def inputs(length: int, window: int) -> list[Tensor]:
    """Queries, keys, values, codebook, bias; then values of a state, near and far."""
    generator = torch.Generator().manual_seed(length)
    sizes = [(length, 4), (length, 4), (length, 5)]
    tokens = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    parameters = [torch.randn(3, *size, generator=generator) for size in ((CODES, 4), (window,))]
    return [*tokens, *parameters, *(torch.randn(2, 3, n, 5, generator=generator) for n in (window - 1, CODES))]


def state_of(codebook: Tensor, near: Tensor, far: Tensor) -> CodebookState:
    last = near.shape[2]
    code = torch.randint(CODES, (2, 3, last), generator=torch.Generator().manual_seed(last))
    real = torch.arange(last) >= torch.tensor([[0], [last // 2]])
    count = torch.tensor([0.0, 3, 1, 0, 2, 5]).to(far).expand(2, 3, -1).clone()
    count[1] = 0  # where the window is not yet full, nothing has left it
    keys = look_up(codebook, code)
    return CodebookState(keys, code, near * real[:, None, :, None], real, count, far * (count > 0)[..., None])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.sampled_from([None, 1, 7, 32]), st.booleans())
def test_forms_agree(length: int, window: int, chunk: int | None, fresh: bool) -> None:
    def run(
        q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, bias: Tensor, near: Tensor, far: Tensor, form: str
    ) -> tuple[Tensor, CodebookState]:
        state = None if fresh else state_of(codebook, near, far)
        return codebook_attention(q, k, v, codebook, bias, state, form=form, chunk=chunk)

    check_forms(run, inputs(length, window))


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_definition(form: str) -> None:
    q, k, v, codebook, bias, *_ = (tensor.double() for tensor in inputs(50, 7))
    distance = torch.arange(50)[:, None] - torch.arange(50)
    local = bias[:, distance.clamp(0, 6)].masked_fill(distance >= 7, 0.0).masked_fill(distance < 0, -torch.inf)
    distances = (k[:, :, :, None] - codebook[None, :, None]).norm(dim=-1)
    quantised = torch.stack([codebook[head][distances[:, head].argmin(-1)] for head in range(3)], 1)
    expected = scaled_dot_product_attention(q, quantised, v, attn_mask=local)
    found, state = codebook_attention(q, k, v, codebook, bias, form=form, chunk=8)
    torch.testing.assert_close(found, expected)
    assert state.counts.sum(-1).eq(44).all()
    torch.testing.assert_close(state.total.sum(2), v[:, :, :44].sum(2))


def test_a_codebook_of_the_keys_gives_softmax_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 4)
    found, _ = codebook_attention(q, k, v, k[0], torch.zeros(2, 3), chunk=4)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5, rtol=1e-4)


def test_gradients_go_to_keys_in_the_window_and_to_codewords_everywhere() -> None:
    q, k, v, codebook, bias, *_ = inputs(30, 5)
    k.requires_grad_()
    codebook.requires_grad_()
    output, _ = codebook_attention(q, k, v, codebook, bias, chunk=8)
    output[:, :, -1].sum().backward()
    assert not k.grad[:, :, :25].any()
    assert k.grad[:, :, 25:].abs().sum(-1).min() > 0
    used = [set(codes.unique().tolist()) for codes in quantise(k, codebook)[1].transpose(0, 1)]
    assert [set(grad.abs().sum(-1).nonzero()[:, 0].tolist()) for grad in codebook.grad] == used


def test_half_precision() -> None:
    half = [tensor.bfloat16() for tensor in inputs(100, 8)[:5]]
    # Of the same rounded keys: another codeword would be another function.
    expected, _ = codebook_attention(*(tensor.float() for tensor in half))
    found, state = codebook_attention(*half)
    assert (found.dtype, state.key.dtype, state.total.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [1, 6, 64])
def test_layer(window: int) -> None:
    torch.manual_seed(0)
    mixer = LongVQ(24, heads=3, codes=5, window=window)
    torch.nn.init.normal_(mixer.bias)
    check_mixer(mixer)
    x = torch.randn(2, 19, 24)
    hidden = mixer.map(x)
    dense = hidden.dense()
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 3, 19))
    torch.testing.assert_close(hidden.received(), dense.sum(2))
    _, state = mixer(x[:, :8])
    torch.testing.assert_close(mixer.map(x[:, 8:], state).dense(), dense[:, :, 8:, 8:], atol=1e-5, rtol=1e-4)


def test_forms_agree_on_padding_after_a_state() -> None:
    q, k, v, codebook, bias, near, far = inputs(25, 6)
    mask = torch.arange(25) >= torch.tensor([[0], [9]])
    state = state_of(codebook, near, far)
    runs = [
        codebook_attention(q, k, v, codebook, bias, state, mask, form=form, chunk=7)
        for form in ("parallel", "chunked", "recurrent")
    ]
    for output, after in runs[1:]:
        torch.testing.assert_close(output[mask[:, None].expand(-1, 3, -1)], runs[0][0][mask[:, None].expand(-1, 3, -1)])
        torch.testing.assert_close(after.counts, runs[0][1].counts)
        torch.testing.assert_close(after.total, runs[0][1].total, atol=1e-5, rtol=1e-4)


def test_padding_after_a_full_window() -> None:
    torch.manual_seed(0)
    mixer, x = LongVQ(16, heads=2, codes=4, window=4).eval(), torch.randn(2, 30, 16)
    _, state = mixer(x[:, :10])
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    found, _ = mixer(x[:, 10:], state, mask)
    joined, _ = mixer(torch.cat([x[1:, :10], x[1:, 16:]], 1))
    torch.testing.assert_close(found[1, 6:], joined[0, 10:], atol=1e-5, rtol=1e-4)


def test_the_state_is_of_one_size() -> None:
    mixer = LongVQ(16, heads=2, codes=5, window=4, exponentials=3)
    for length in (1, 70):
        state = mixer(torch.randn(3, length, 16))[1]
        assert state.bytes == 4 * (5 * (16 + 2) + 2 * 3 * 16 + 3 * 16) + 8 * 3 * 2 + 3


def test_commitment_pulls_keys_and_codewords_together() -> None:
    torch.manual_seed(0)
    mixer, x = LongVQ(16, heads=2, codes=4, window=4), torch.randn(2, 40, 16)
    optimizer = torch.optim.Adam(mixer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        mixer(x)
        optimizer.zero_grad()
        mixer.commitment.backward()
        optimizer.step()
        losses.append(mixer.commitment.item())
    assert losses[-1] < 0.5 * losses[0]


def test_commitment_leaves_padding_out_and_copies_drop_it() -> None:
    mixer, x = LongVQ(16, heads=2, codes=4, window=4), torch.randn(1, 12, 16)
    mixer(x)
    alone = mixer.commitment
    mask = torch.arange(15)[None] < 12
    mixer(torch.cat([x, torch.randn(1, 3, 16)], 1), mask=mask)
    torch.testing.assert_close(mixer.commitment, alone)
    copied = deepcopy(mixer)
    assert copied.commitment is None
    assert mixer.commitment is not None
    torch.testing.assert_close(copied(x)[0], mixer(x)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": torch.zeros(2, 6, 3)}, r"the codebook must be \(2, codes, 4\).*got \(2, 6, 3\)"),
        ({"bias": torch.zeros(3, 4)}, r"the bias must be \(2, window\), got \(3, 4\)"),
        ({"bias": torch.zeros(2, 0)}, r"window must be at least 1, got 0"),
        ({"mask": torch.ones(1, 5)}, r"mask must be boolean, of shape \(1, 5\)"),
        ({"form": "fast"}, r"form must be one of"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    given = {"query": q, "key": k, "value": v, "codebook": torch.zeros(2, 6, 4), "bias": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        codebook_attention(**(given | change))


def test_a_state_of_another_codebook() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    _, state = codebook_attention(q, k, v, torch.zeros(2, 6, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"the state's counts must be of shape \(1, 2, 7\), got \(1, 2, 6\)"):
        codebook_attention(q, k, v, torch.zeros(2, 7, 4), torch.zeros(2, 3), state)


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match=r"LongVQ: codes must be at least 1, got 0"):
        LongVQ(8, heads=2, codes=0)
    with pytest.raises(ValueError, match=r"LongVQ: window must be at least 1, got 0"):
        LongVQ(8, heads=2, window=0)
