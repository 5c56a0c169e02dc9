"""A map that is known by what it does to values, against the same one stored."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from regard.maps import token_map
from regard.mixers import HiddenMap, SelectiveSSM, chunked_attention

BATCH, HEADS, QUERIES, KEYS = 2, 3, 9, 11


@pytest.fixture(params=[2**22, 2 * BATCH * HEADS * QUERIES], ids=["at once", "two columns at a time"])
def stored(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """A matrix, while maps read so many numbers at once."""
    matrix = torch.randn(BATCH, HEADS, QUERIES, KEYS, dtype=torch.float64)
    matrix[:, :, 2, 3:] = 0.0
    with patch.object(token_map, "_NUMBERS_AT_ONCE", request.param):
        yield matrix


def hidden(matrix: Tensor) -> HiddenMap:
    batch, heads, queries, keys = matrix.shape
    values = torch.randn(batch, heads, keys, 4, dtype=matrix.dtype)
    return HiddenMap(lambda v: matrix @ v, (batch, heads, queries, keys), values)


def test_entries(stored: Tensor) -> None:
    P = hidden(stored)
    torch.testing.assert_close(P.dense(), stored)
    torch.testing.assert_close(P.rows([7, 0]), stored[:, :, [7, 0]])
    torch.testing.assert_close(P.tile(slice(1, 9), [10, 2, 2]), stored[:, :, 1:9, [10, 2, 2]])
    torch.testing.assert_close(P.tile([3, -1], slice(2, 8)), stored[:, :, [3, -1], 2:8])
    targets = torch.tensor([[0, 10, -1, 3, 4, 5, 6, 7, 8], [10, 9, 8, 7, 6, -1, 4, 3, 2]])
    expected = stored.gather(3, targets.clamp(min=0)[:, None, :, None].expand(-1, HEADS, -1, -1)).squeeze(3)
    torch.testing.assert_close(P.at(targets), expected.masked_fill((targets < 0)[:, None], 0.0))
    torch.testing.assert_close(P.at(targets[0]), P.at(targets[:1].expand(2, -1)))


def test_products(stored: Tensor) -> None:
    P, values = hidden(stored), torch.randn(1, HEADS, KEYS, 5, dtype=torch.float64)
    torch.testing.assert_close(P @ values, stored @ values)
    weights = torch.randn(BATCH, 1, QUERIES, 5, dtype=torch.float64)
    torch.testing.assert_close(P.T @ weights, stored.mT @ weights)
    assert (P @ values.float()).dtype == (P.T @ weights.float()).dtype == torch.float32
    torch.testing.assert_close(P.received(), stored.sum(2))
    torch.testing.assert_close(P.received(weights[..., 0]), (stored * weights[..., :1]).sum(2))
    mass = P.mass({"first": 0, "some": [1, 3]})
    torch.testing.assert_close(mass, torch.stack([stored[..., 0], stored[..., [1, 3]].sum(-1)], -1))
    blocks = torch.stack([part.sum(3) for part in stored.split([4, 4, 3], dim=3)], 3)
    torch.testing.assert_close(P.pool(9, 3), blocks)


def test_orderings_and_distances(stored: Tensor) -> None:
    P = hidden(stored)
    shares, keys = P.topk(KEYS)
    expected = stored.topk(KEYS, dim=3)
    torch.testing.assert_close(shares, expected.values)
    assert torch.equal(keys, expected.indices.masked_fill(expected.values == 0, -1))
    assert (keys[:, :, 2] < 0).sum() == BATCH * HEADS * (KEYS - 3)
    torch.testing.assert_close(P.max(), stored.amax(3))
    distance = (torch.arange(QUERIES)[:, None] + 5 - torch.arange(KEYS) - 2).abs()
    torch.testing.assert_close(P.mean_distance(query_start=5, key_start=2), (stored * distance).sum(3))


def test_some_heads(stored: Tensor) -> None:
    whole = hidden(stored)
    P = whole.heads([2, 0])
    assert P.shape == (BATCH, 2, QUERIES, KEYS)
    torch.testing.assert_close(P.dense(), stored[:, [2, 0]])
    torch.testing.assert_close(P.received(), stored[:, [2, 0]].sum(2))
    torch.testing.assert_close(P.rows([4]), stored[:, [2, 0], 4:5])
    assert torch.equal(P.values, whole.values[:, [2, 0]])
    with pytest.raises(IndexError, match="heads names position 3, but there are 3 heads"):
        whole.heads([3])
    with pytest.raises(ValueError, match=r"chosen once each, got \[0, 0\]"):
        whole.heads([0, 0])


def test_other_orders_of_tokens(stored: Tensor) -> None:
    """Two keys before the text's own nine, of which padding was moved to the end."""
    real = torch.tensor([[True] * 9, [False, True, True, False, True, True, True, True, False]])
    order = (~real).long().argsort(dim=1, stable=True)
    P = hidden(stored)
    found = P.rearranged(order, real)
    expected, values = torch.zeros_like(stored), torch.zeros_like(P.values)
    for row in range(BATCH):
        for i in range(QUERIES):
            for j in range(KEYS):
                key = j if j < 2 else 2 + int(order[row, j - 2])
                values[row, :, key] = P.values[row, :, j] * (j < 2 or real[row, key - 2])
                if real[row, order[row, i]] and (j < 2 or real[row, key - 2]):
                    expected[row, :, order[row, i], key] = stored[row, :, i, j]
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.received(), expected.sum(2))
    torch.testing.assert_close(found.values, values)


def test_long_texts_are_read_in_strips_and_have_no_limit() -> None:
    tokens, widest = 8192, 0

    def apply(values: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, values.numel())
        return values.cumsum(2)

    P = HiddenMap(apply, (1, 5, tokens, tokens), torch.zeros(1, 5, tokens, 1))
    with pytest.raises(ValueError, match=r"a matrix of shape \(1, 5, 8192, 8192\) takes 1.2 GiB"):
        P.dense()
    place = torch.arange(tokens)
    one = P.heads([0])
    assert torch.equal(one.at(tokens - 1 - place)[0, 0], (tokens - 1 - place <= place).float())
    torch.testing.assert_close(one.mean_distance()[0, 0], place * (place + 1) / 2, rtol=1e-5, atol=0.0)
    assert torch.equal(one.topk(2).keys[0, 0, 0].sort().values, torch.tensor([-1, 0]))
    assert torch.equal(one.topk(2).shares[0, 0, 1:], torch.ones(tokens - 1, 2))
    assert torch.equal(one.rows([5])[0, 0, 0], (place <= 5).float())
    assert widest <= 2**22


def test_transposed_products_are_differentiable_and_take_checkpointed_functions() -> None:
    query, key, value = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    query.requires_grad_()

    def apply(values: Tensor) -> Tensor:
        return chunked_attention(query, key, values, query_chunk=3, key_chunk=2)[0]

    P = HiddenMap(apply, (1, 2, 7, 7), value)
    hidden_future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    matrix = (query @ key.mT / 2).masked_fill(hidden_future, -torch.inf).softmax(-1)
    torch.testing.assert_close(P.rows([2, 5]), matrix[:, :, [2, 5]])
    weights = torch.randn(1, 2, 7, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad((P.T @ weights).square().sum(), query)
    (expected,) = torch.autograd.grad((matrix.mT @ weights).square().sum(), query)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not (P.T @ weights).requires_grad


def test_questions_without_an_answer() -> None:
    P = hidden(torch.randn(BATCH, HEADS, QUERIES, KEYS))
    for question in (P.entropy, P.logsumexp, P.viewers):
        with pytest.raises(NotImplementedError, match=f"has no {question.__name__}: .* It has products, received"):
            question()
    with pytest.raises(NotImplementedError, match="has no entropy"):
        P.expect("entropy")
    P.expect("received")
    known = "entropy, received, mass, product, block_sums, mean_distance"
    with pytest.raises(ValueError, match=rf"expect\(\) knows {known}; got 'max'"):
        P.expect("max")
    with pytest.raises(ValueError, match=r"mixes values of shape \(2, 3, 11, width\), got \(2, 3, 9, 4\)"):
        HiddenMap(lambda v: v, P.shape, torch.zeros(2, 3, 9, 4))
    with pytest.raises(ValueError, match=r"needs V of shape \(2 or 1, 3 or 1, 11, width\), got \(2, 3, 9, 4\)"):
        P @ torch.zeros(2, 3, 9, 4)
    with pytest.raises(ValueError, match=r"needs V of shape \(2 or 1, 3 or 1, 9, width\), got \(2, 3, 11, 4\)"):
        P.T @ torch.zeros(2, 3, 11, 4)
    with pytest.raises(ValueError, match=r"targets must be positions of shape \(9,\) or \(2, 9\)"):
        P.at(torch.zeros(11, dtype=torch.long))
    with pytest.raises(IndexError, match="targets go from 11 to 11; keys from 0 to 10"):
        P.at(torch.full((QUERIES,), 11))
    with pytest.raises(ValueError, match=r"topk\(12\) of 11 keys"):
        P.topk(12)
    with pytest.raises(ValueError, match=r"received\(\) needs weights"):
        P.received(torch.ones(QUERIES))


@pytest.mark.parametrize("padded", [False, True])
def test_heads_that_are_known_apart_are_asked_alone(stored: Tensor, padded: bool) -> None:
    """As channels are: what is chosen of them is computed, also of what was chosen before, and of other orders."""
    asked: list[list[int]] = []

    def of_heads(index: Tensor) -> Callable[[Tensor], Tensor]:
        asked.append(index.tolist())
        return lambda values: stored[:, index] @ values

    plain = hidden(stored)
    apart = HiddenMap(lambda values: stored @ values, plain.shape, plain.values, of_heads)
    if padded:
        real = torch.tensor([[True] * 9, [False, True, True, False, True, True, True, True, False]])
        order = (~real).long().argsort(dim=1, stable=True)
        plain, apart = plain.rearranged(order, real), apart.rearranged(order, real)
    some = apart.heads([2, 0]).heads([1])
    torch.testing.assert_close(some.dense(), plain.heads([0]).dense())
    torch.testing.assert_close(some.received(), plain.heads([0]).received())
    assert torch.equal(some.values, plain.heads([0]).values)
    assert asked == [[2, 0], [0]]


def test_channels_of_a_selective_space_are_known_apart() -> None:
    with torch.no_grad():
        every = SelectiveSSM(8).map(torch.randn(2, 10, 8))
        torch.testing.assert_close(every.heads([11, 2]).dense(), every.dense()[:, [11, 2]])
