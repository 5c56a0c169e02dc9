"""Linear attention with decay: its forms, both ways, and the matrix that it hides."""

import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.mixers import HiddenMap, linear_attention
from tests.mixers.contract import check_forms

KINDS = ["none", "head", "token", "channel"]


def inputs(length: int, kind: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, 3, length, 4, generator=generator)
    v = torch.randn(2, 3, length, 5, generator=generator)
    shape = {"none": (0,), "head": (3,), "token": (2, 3, length), "channel": (2, 3, length, 4)}[kind]
    return [q, k, v, -torch.rand(shape, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.sampled_from(KINDS), st.integers(1, 70))
def test_forms_agree(length: int, kind: str, chunk: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return linear_attention(q, k, v, decay if decay.numel() else None, state, form=form, chunk=chunk)

    check_forms(run, inputs(length, kind))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 70))
def test_pieces_agree(length: int, kind: str, chunk: int, piece: int) -> None:
    q, k, v, decay, state = (tensor.double() for tensor in inputs(length, kind))
    decays = decay if decay.numel() else None
    expected = linear_attention(q, k, v, decays, state, form="parallel")
    with torch.no_grad(), patch.object(sys.modules[linear_attention.__module__], "_PIECE", piece):
        found = linear_attention(q, k, v, decays, state, chunk=chunk)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["parallel", "chunked", "recurrent"])
def test_both_ways(kind: str, form: str) -> None:
    q, k, v, decay, _ = (tensor.double() for tensor in inputs(23, kind))
    total = torch.zeros(2, 3, 23, 1).double()
    if kind != "none":
        spread = decay[None, :, None].expand(2, 3, 23) if kind == "head" else decay
        total = (spread if spread.ndim == 4 else spread[..., None]).cumsum(2)
    between = (-(total[:, :, :, None] - total[:, :, None]).abs()).exp()
    expected = torch.einsum("bhid,bhjd,bhijd,bhjv->bhiv", q, k, between.expand(-1, -1, -1, -1, 4), v)
    found, _ = linear_attention(q, k, v, decay if decay.numel() else None, causal=False, form=form, chunk=8)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    q, k, v, decay, _ = inputs(100, "token")
    expected, _ = linear_attention(q, k, v, decay)
    found, state = linear_attention(*(tensor.bfloat16() for tensor in (q, k, v, decay)))
    assert found.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)


def test_strong_decays_over_long_texts_stay_finite() -> None:
    q, k, v = torch.randn(3, 1, 2, 3000, 8)
    for decay in (torch.full((1, 2, 3000), -50.0), torch.full((1, 2, 3000, 8), -50.0)):
        decay.requires_grad_()
        output, _ = linear_attention(q, k, v, decay)
        output.sum().backward()
        assert torch.isfinite(output).all()
        assert torch.isfinite(decay.grad).all()
    torch.testing.assert_close(output, (q * k).sum(-1, keepdim=True) * v)


def test_hidden_map() -> None:
    q, k, _, decay, _ = (tensor.double() for tensor in inputs(30, "token"))
    total = decay.cumsum(-1)
    matrix = ((q @ k.mT) * (total[..., :, None] - total[..., None, :]).exp()).tril()
    found = HiddenMap(lambda v: linear_attention(q, k, v, decay)[0], (2, 3, 30, 30), q)
    torch.testing.assert_close(found.dense(), matrix)
    torch.testing.assert_close(found.received(), matrix.sum(2))
    weights = torch.rand(2, 1, 30).double()
    torch.testing.assert_close(found.received(weights), (matrix * weights[..., None]).sum(2))
    torch.testing.assert_close(found.mass({"a": [0, 3], "b": slice(4, 9)})[..., 1], matrix[..., 4:9].sum(-1))
    torch.testing.assert_close(found.rows([3, -1]), matrix[:, :, [3, -1]])
    torch.testing.assert_close(found.tile([3], [1, 2]), matrix[:, :, [3]][..., [1, 2]])
    torch.testing.assert_close(found.at(torch.arange(30) - 1)[..., 1:], matrix.diagonal(-1, 2, 3))
    torch.testing.assert_close(found.pool(3, 5).sum((-1, -2)), matrix.sum((-1, -2)))
    torch.testing.assert_close(found.topk(2).shares, matrix.topk(2).values)
    distance = (torch.arange(30)[:, None] - torch.arange(30)).abs()
    torch.testing.assert_close(found.mean_distance(), (matrix * distance).sum(-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.randn(1, 2, 5, 3)}, r"query and key must be of one shape.*\(1, 2, 5, 4\), \(1, 2, 5, 3\)"),
        ({"value": torch.randn(2, 5, 4)}, r"must be \(batch, heads, tokens, dim\)"),
        ({"log_decay": torch.zeros(5)}, r"log_decay must be of shape \(2,\), \(1, 2, 5\), \(1, 2, 5, 4\).*got \(5,\)"),
        ({"state": torch.zeros(1, 2, 4, 5)}, r"the state must be of shape \(1, 2, 4, 4\), got \(1, 2, 4, 5\)"),
        ({"state": torch.zeros(1, 2, 4, 4), "causal": False}, r"without causal=True there is no state"),
        ({"form": "fast"}, r"form must be one of parallel, chunked, recurrent; got 'fast'"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"query": q, "key": k, "value": v} | change))
