"""Mixtures of heads."""

import pytest
import torch

from regard import AttentionMap
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_mixtures() -> None:
    A, P = attention(2, 3, 5, 6)
    weights, each = normal(4, 3), normal(2, 4, 3)
    check_answers(A.mix_heads(weights), torch.einsum("oh,bhnm->bonm", weights, P))
    check_answers(A.mix_heads(each), torch.einsum("boh,bhnm->bonm", each, P))
    check_answers(hidden(P).mix_heads(each), torch.einsum("boh,bhnm->bonm", each, P))
    check_answers(A.mean_heads(), P.mean(1, keepdim=True))


def test_gradients() -> None:
    def talking(query, key, weights):
        return AttentionMap(query, key, is_causal=True).mix_heads(weights)

    check_gradients(talking, normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=2), normal(3, 2))


def test_probabilities_are_known_of_means() -> None:
    A, _ = attention(2, 3, 5, 6)
    assert A.mean_heads().has_probability_rows
    assert A.mix_heads(torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])).has_probability_rows
    assert not A.mix_heads(torch.tensor([[2.0, -1.0, 0.0]])).has_probability_rows
    assert not A.mix_heads(torch.tensor([[0.2, 0.3, 0.4]])).has_probability_rows


def test_weights_that_do_not_fit() -> None:
    A, _ = attention(2, 3, 5, 6)
    for weights in (torch.ones(3, 2), torch.ones(3), torch.ones(3, 1, 3), torch.ones(0, 3)):
        with pytest.raises(
            ValueError, match=r"mix_heads\(\) needs weights of shape \(heads out, 3\) or \(2 or 1, heads out"
        ):
            A.mix_heads(weights)
