"""Products of maps, and what layers and their residual streams do together."""

import pytest
import torch

from regard import AttentionMap
from regard.maps import Identity, TokenMap
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_products() -> None:
    (A, P), (B, Q) = attention(2, 3, 5, 7), attention(2, 3, 7, 4, seed=5, is_causal=False)
    R = normal(2, 3, 4, 6)
    check_answers(A @ B, P @ Q)
    check_answers(A @ B @ hidden(R), P @ Q @ R)
    check_answers(A.T @ (A @ B), P.mT @ P @ Q)


def test_rollout() -> None:
    """S. Abnar and W. Zuidema (2020), as matrices: the mean over heads, half residual, layer upon layer."""
    layers = [attention(2, 3, 6, 6, seed=seed) for seed in (1, 3, 5)]
    rollout: TokenMap = Identity(2, 1, 6, torch.float64)
    matrix = torch.eye(6, dtype=torch.float64).expand(2, 1, 6, 6)
    for A, P in layers:
        rollout = A.mean_heads().residual(0.5) @ rollout
        matrix = (P.mean(1, keepdim=True) / 2 + torch.eye(6) / 2) @ matrix
    assert rollout.has_probability_rows
    check_answers(rollout, matrix)


def test_residual_with_factors_of_heads() -> None:
    A, P = attention(2, 3, 6, 6)
    alpha = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    factors = alpha[:, None, None]
    check_answers(A.residual(alpha), factors * P + (1 - factors) * torch.eye(6, dtype=torch.float64))
    check_answers(hidden(P).residual(0.3), 0.3 * P + 0.7 * torch.eye(6, dtype=torch.float64))


def test_gradients() -> None:
    def rollout(query, key, alpha):
        A, B = AttentionMap(query, key, is_causal=True), AttentionMap(key, query)
        return A.residual(alpha) @ hidden(normal(1, 2, 4, 4)) @ B.T

    check_gradients(rollout, normal(1, 2, 4, 3), normal(1, 2, 4, 3, seed=2), normal(2))


def test_probabilities_of_products() -> None:
    (A, _), (B, _) = attention(1, 2, 5, 5), attention(1, 2, 5, 5, seed=4)
    assert (A @ B).has_probability_rows
    assert not (A @ B.T).has_probability_rows
    assert not (2.0 * A @ B).has_probability_rows


def test_what_sinks_take_is_no_key_s() -> None:
    query, key = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=2)
    logits = torch.cat([query @ key.mT / 2, torch.ones(1, 2, 5, 1)], -1)
    A = AttentionMap(query, key, sinks=torch.ones(2))
    matrix = logits.softmax(-1)[..., :5]
    rollout = A.residual(0.5) @ A
    assert A.has_probability_rows
    assert rollout.has_probability_rows
    check_answers(rollout, (matrix / 2 + torch.eye(5) / 2) @ matrix)


def test_shapes_that_do_not_fit() -> None:
    (A, _), (B, _) = attention(1, 2, 5, 7), attention(1, 2, 5, 7)
    with pytest.raises(ValueError, match=r"a product needs .*got .* \(1, 2, 5, 7\) and \(1, 2, 5, 7\)"):
        A @ B
    with pytest.raises(ValueError, match=r"residual\(\) needs as many queries as keys, got .*\(1, 2, 5, 7\)"):
        A.residual(0.5)
