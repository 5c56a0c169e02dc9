"""Calls of every shape that the operator takes, and outputs in memory as it leaves them."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import regard

STATISTICS = {
    "entropy": regard.Entropy(),
    "received": regard.Received(),
    "mass": regard.Mass({"first": [0]}),
    "pooled": regard.Pooled(2),
    "value norm": regard.ValueNorm(),
    "sinks": regard.Sinks(),
    "rows": regard.Rows([0]),
}
BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **{name: lambda statistic=statistic: regard.watch(statistic) for name, statistic in STATISTICS.items()},  # type: ignore[misc]
    "steer": lambda: regard.steer(None, regard.Temperature(2.0)),
    "gate": lambda: regard.steer(None, regard.Gate(2.0)),
}


def tokens_first(*shape: int) -> Tensor:
    """As models have them: heads of one projection."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("make", [torch.randn, tokens_first])
@pytest.mark.parametrize("width", [8, 4])
def test_outputs_lie_in_memory_as_they_do(block: str, make: Callable[..., Tensor], width: int) -> None:
    query, key, value = make(2, 3, 6, 8), make(2, 3, 6, 8), make(2, 3, 6, width)
    plain = scaled_dot_product_attention(query, key, value)
    with BLOCKS[block]():
        output = scaled_dot_product_attention(query, key, value)
    assert output.stride() == plain.stride()
    if plain.transpose(1, 2).is_contiguous():
        output.transpose(1, 2).view(2, 6, 3 * width)


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "values for all rows": ((2, 2, 4, 8), (2, 2, 4, 8), (1, 2, 4, 8)),
    "values for all heads": ((2, 2, 4, 8), (2, 2, 4, 8), (2, 1, 4, 8)),
    "keys for all rows": ((2, 2, 4, 8), (1, 2, 4, 8), (2, 2, 4, 8)),
    "queries for all rows": ((1, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)),
    "one query head over eight": ((1, 1, 4, 8), (1, 8, 4, 8), (1, 8, 4, 8)),
    "five dimensions": ((2, 3, 2, 4, 8), (1, 3, 2, 4, 8), (2, 1, 2, 4, 8)),
    "fewer dimensions of keys": ((2, 3, 4, 8), (3, 4, 8), (3, 4, 8)),
    "more dimensions of keys": ((3, 4, 8), (2, 3, 4, 8), (2, 3, 4, 8)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("share", [True, False])
def test_what_is_broadcast_is_read(shapes: tuple[tuple[int, ...], ...], share: bool) -> None:
    query, key, value = (torch.randn(shape) for shape in shapes)
    plain = scaled_dot_product_attention(query, key, value)
    with regard.watch(regard.Received(), share=share) as seen:
        output = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output, plain)
    matrix = (query.double() @ key.double().mT * 8**-0.5).softmax(-1)
    matrix = matrix.expand(*plain.shape[:-1], matrix.shape[-1])
    received = torch.as_tensor(seen.dataset().received.values).double().squeeze(0)
    torch.testing.assert_close(received.reshape(-1), matrix.sum(-2).reshape(-1), rtol=0, atol=1e-5)
    with regard.steer(None, regard.Gate(2.0)):
        torch.testing.assert_close(scaled_dot_product_attention(query, key, value), 2 * plain)


def test_one_query_head_over_eight_is_eight() -> None:
    query, key = torch.randn(1, 1, 4, 8), torch.randn(1, 8, 4, 8)
    with regard.watch(regard.Received(), heads=[5]) as seen:
        scaled_dot_product_attention(query, key, key)
    expected = (query @ key[:, 5:6].mT * 8**-0.5).softmax(-1).sum(2)
    torch.testing.assert_close(torch.as_tensor(seen.dataset().received[0].values), expected)


EMPTY = [shape for shape in itertools.product([0, 2], [0, 2], [0, 4], [0, 8]) if 0 in shape and shape[3]]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_calls_run_as_they_do(shape: tuple[int, ...]) -> None:
    query = torch.randn(shape)
    plain = scaled_dot_product_attention(query, query, query)
    for block in (regard.watch(regard.Entropy(), regard.Received()), regard.steer(None, regard.Temperature(2.0))):
        with block:
            assert scaled_dot_product_attention(query, query, query).shape == plain.shape
    full = torch.randn(2, 2, 4, 8)
    with regard.watch(regard.Entropy()) as seen:
        without_keys = scaled_dot_product_attention(full, full[:, :, :0], full[:, :, :0])
        scaled_dot_product_attention(full, full, full)
    torch.testing.assert_close(without_keys, scaled_dot_product_attention(full, full[:, :, :0], full[:, :, :0]))
    assert seen.dataset().sizes["query"] == 4


def test_tensors_without_numbers_run_unread_and_say_so() -> None:
    meta = torch.empty(1, 2, 4, 8, device="meta")
    with FakeTensorMode():
        fake = torch.randn(1, 2, 4, 8)
    for query, name in ((meta, "meta"), (fake, "FakeTensor")):
        with regard.watch(regard.Entropy()) as seen, pytest.warns(UserWarning, match=f"was not read.*{name}"):
            assert scaled_dot_product_attention(query, query, query).shape == query.shape
        assert not seen.dataset()
