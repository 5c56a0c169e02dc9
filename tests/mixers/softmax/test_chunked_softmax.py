"""Exact attention by tiles: the softmax itself, at any size of tile, and in little memory."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from regard.mixers import ChunkedSoftmaxAttention, SoftmaxAttention, chunked_attention
from tests.mixers.contract import check_forms, check_mixer


def inputs(queries: int, keys: int, before: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, 4), (keys, 4), (keys, 5), (before, 4), (before, 5)]
    return [3 * torch.randn(2, 3, *shape, generator=generator) for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.integers(0, 40), st.booleans(), st.integers(1, 50), st.integers(1, 50))
def test_forms_agree(length: int, before: int, causal: bool, query_chunk: int, key_chunk: int) -> None:
    def run(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, form: str
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = (keys, values) if before else None
        return chunked_attention(q, k, v, state, causal=causal, form=form, query_chunk=query_chunk, key_chunk=key_chunk)

    check_forms(run, inputs(length, length, before))


@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
@pytest.mark.parametrize("additive", [True, False])
def test_cross_attention_with_masks(form: str, additive: bool) -> None:
    q, k, v, _, _ = (tensor.double() for tensor in inputs(23, 31, 0))
    mask = torch.rand(2, 1, 23, 31, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[..., 0] = True
    if additive:
        mask = torch.randn(3, 23, 31).double().masked_fill(~mask[0], -torch.inf).requires_grad_()
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    sizes = {"query_chunk": 7, "key_chunk": 4}
    found, _ = chunked_attention(q, k, v, mask=mask, causal=False, scale=0.3, form=form, **sizes)
    torch.testing.assert_close(found, expected)
    if additive:
        weights = torch.randn_like(found)
        gradients = [torch.autograd.grad((y * weights).sum(), mask)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_rows_that_see_nothing_are_zeros_and_their_gradients_too() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in torch.randn(3, 1, 2, 10, 4))
    mask = torch.ones(10, 10, dtype=torch.bool)
    mask[4] = False
    mask[:, :6] = False
    output, _ = chunked_attention(q, k, v, mask=mask, query_chunk=3, key_chunk=2)
    output.sum().backward()
    assert not output[:, :, :6].any()
    assert output[:, :, 6:].all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (q, k, v))
    assert not q.grad[:, :, :6].any()


def test_large_logits_stay_finite() -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=torch.Generator().manual_seed(0)).double()
    found, _ = chunked_attention(100 * q, 100 * k, v, key_chunk=7)
    torch.testing.assert_close(found, scaled_dot_product_attention(100 * q, 100 * k, v, is_causal=True))
    single, _ = chunked_attention(1e4 * q.float(), 1e4 * k.float(), v.float(), key_chunk=7)
    assert torch.isfinite(single).all()


def test_half_precision() -> None:
    q, k, v = torch.randn(3, 1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
    expected, _ = chunked_attention(q, k, v, query_chunk=16, key_chunk=16)
    found, _ = chunked_attention(*(t.bfloat16() for t in (q, k, v)), query_chunk=16, key_chunk=16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made


def test_no_more_than_tiles_are_made_forward_or_backward() -> None:
    length, side = 256, 16
    q, k, v = (tensor.requires_grad_() for tensor in torch.randn(3, 1, 1, length, 4))
    with Sizes() as sizes:
        output, _ = chunked_attention(q, k, v, query_chunk=side, key_chunk=side)
        output.sum().backward()
    assert sizes.largest <= length * 4


def test_causal_calls_skip_what_lies_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.mixers.softmax import chunked_softmax

    tiles = []
    partial = chunked_softmax._partial
    monkeypatch.setattr(chunked_softmax, "_partial", lambda tile: tiles.append(1) or partial(tile))
    chunked_attention(*torch.randn(3, 1, 1, 40, 4), query_chunk=10, key_chunk=10)
    assert len(tiles) == 4 + 3 + 2 + 1


def test_layer() -> None:
    torch.manual_seed(0)
    mixer = ChunkedSoftmaxAttention(24, heads=3, query_chunk=5, key_chunk=4)
    check_mixer(mixer)
    plain = SoftmaxAttention(24, heads=3)
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.randn(1, 2, 5, 3)}, r"query and key of one width.*got \(1, 2, 5, 4\), \(1, 2, 5, 3\)"),
        ({"value": torch.randn(2, 5, 4)}, r"must be \(batch, heads, tokens, dim\)"),
        ({"query": torch.randn(1, 2, 6, 4)}, r"a key for each query, got 6 queries and 5 keys"),
        ({"query": torch.randn(1, 2, 0, 4)}, r"there are no tokens"),
        ({"mask": torch.ones(4, 5)}, r"mask must be broadcastable to \(1, 2, 5, 5\), got \(4, 5\)"),
        ({"query_chunk": 0}, r"query_chunk and key_chunk must be at least 1, got 0, 1024"),
        ({"form": "fast"}, r"form must be one of parallel, chunked, recurrent; got 'fast'"),
        (
            {"state": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 4))},
            r"the state's values must be of shape \(1, 2, 3, 4\), got \(1, 2, 4, 4\)",
        ),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        chunked_attention(**({"query": q, "key": k, "value": v} | change))
