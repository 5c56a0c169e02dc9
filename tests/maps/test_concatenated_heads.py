"""Heads of several maps side by side."""

import pytest
import torch

from regard import AttentionMap
from regard.maps import ConcatenatedHeads
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_heads_side_by_side() -> None:
    (A, P), R = attention(2, 3, 5, 6), normal(2, 2, 5, 6)
    both = ConcatenatedHeads(A, hidden(R), A.mean_heads())
    check_answers(both, torch.cat([P, R, P.mean(1, keepdim=True)], 1))
    check_answers(both.heads([5, 0, 1, 4]), torch.cat([P.mean(1, keepdim=True), P[:, :2], R[:, 1:]], 1))


def test_probabilities_and_their_entropy_are_those_of_the_parts() -> None:
    A, P = attention(2, 3, 5, 6)
    both = ConcatenatedHeads(A, A.mean_heads())
    assert both.has_probability_rows
    torch.testing.assert_close(both.entropy()[:, 3], torch.special.entr(P.mean(1)).sum(-1))
    assert not ConcatenatedHeads(A, A * 2.0).has_probability_rows
    assert not ConcatenatedHeads(A, hidden(P)).has_probability_rows


def test_gradients() -> None:
    def side_by_side(query, key):
        return ConcatenatedHeads(AttentionMap(query, key, is_causal=True), AttentionMap(key, query).T)

    check_gradients(side_by_side, normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=2))


def test_shapes_that_do_not_fit() -> None:
    (A, _), (B, _) = attention(1, 2, 5, 6), attention(1, 2, 6, 6)
    with pytest.raises(ValueError, match=r"agree in batch, queries and keys; got \(1, 2, 5, 6\) and \(1, 2, 6, 6\)"):
        ConcatenatedHeads(A, B)
