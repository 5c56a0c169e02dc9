"""Transposed maps answer whatever maps do."""

import torch

from regard import AttentionMap
from regard.maps import Identity
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_transposed_maps() -> None:
    A, P = attention(2, 3, 5, 6)
    check_answers(A.T, P.mT)
    check_answers(A.T.heads([2, 0]), P.mT[:, [2, 0]])
    check_answers(hidden(P).T, P.mT)
    check_answers(A.T.restrict([4, 2], slice(1, 4)), P.mT[:, :, [4, 2], 1:4])
    assert A.T.T is A
    assert not A.T.has_probability_rows
    identity = Identity(1, 2, 3)
    assert identity.T is identity


def test_gradients() -> None:
    def transposed(query, key):
        return AttentionMap(query, key, is_causal=True).T

    check_gradients(transposed, normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=2))


def test_the_query_that_gives_each_key_most() -> None:
    A, P = attention(2, 3, 5, 5)
    assert torch.equal(A.T.topk(1).keys[..., 0], P.argmax(2))
