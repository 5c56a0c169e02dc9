"""Factors of heads, rows and keys."""

import pytest
import torch

from regard import AttentionMap
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_factors() -> None:
    A, P = attention(2, 3, 5, 6)
    check_answers(A * 0.5, P * 0.5)
    check_answers(-A, -P)
    check_answers(torch.tensor([1.0, -2.0, 0.0]) * A, torch.tensor([1.0, -2.0, 0.0])[:, None, None] * P)
    check_answers(A * normal(2, 3), normal(2, 3)[..., None, None] * P)
    check_answers(A.scale_rows(normal(5)), normal(5)[:, None] * P)
    check_answers(A.scale_rows(normal(2, 1, 5)), normal(2, 1, 5)[..., None] * P)
    check_answers(A.scale_keys(normal(1, 3, 6)), normal(1, 3, 6)[:, :, None] * P)
    check_answers(hidden(P).scale_rows(normal(5)).scale_keys(normal(6)), normal(5)[:, None] * P * normal(6))


def test_gradients() -> None:
    def gated(query, key, heads, rows, keys):
        return (AttentionMap(query, key, is_causal=True) * heads).scale_rows(rows).scale_keys(keys)

    inputs = normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=2), normal(2), normal(1, 2, 4, seed=3), normal(5)
    check_gradients(gated, *inputs)


def test_factors_that_do_not_fit() -> None:
    A, _ = attention(2, 3, 5, 6)
    with pytest.raises(ValueError, match=r"\(3,\) or \(2 or 1, 3\), got \(5,\); scale_rows\(\) and scale_keys\(\)"):
        A * torch.ones(5)
    with pytest.raises(ValueError, match=r"scale_rows\(\) needs factors of shape \(5,\) or .*, got \(6,\)"):
        A.scale_rows(torch.ones(6))
    with pytest.raises(ValueError, match=r"scale_keys\(\) needs factors of shape \(6,\) or .*, got \(3, 6\)"):
        A.scale_keys(torch.ones(3, 6))
    with pytest.raises(TypeError, match="A @ B is the product"):
        A * A
