"""Sums and differences of maps."""

import pytest
import torch

from regard import AttentionMap
from regard.maps import Identity, Sum, _pass, _select
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


def test_sums_and_differences() -> None:
    (A, P), (B, Q) = attention(2, 3, 5, 5), attention(2, 3, 5, 5, seed=7, is_causal=False)
    R = normal(2, 3, 5, 5)
    check_answers(A + B, P + Q)
    check_answers(A - 0.8 * B + hidden(R), P - 0.8 * Q + R)
    check_answers(A - A.T, P - P.mT)


def test_gradients() -> None:
    def difference(query, key, factor):
        A, B = AttentionMap(query, key, is_causal=True), AttentionMap(key, query)
        return A - factor * B

    check_gradients(difference, normal(1, 2, 4, 3), normal(1, 2, 4, 3, seed=2), normal(2))


def test_half_precision_parts_give_float32_answers() -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 8).bfloat16()
    A, B = AttentionMap(query, key), AttentionMap(key, query)
    P, Q = (
        (query.double() @ key.double().mT / 8**0.5).softmax(-1),
        (key.double() @ query.double().mT / 8**0.5).softmax(-1),
    )
    difference = A - B
    assert difference.received().dtype == torch.float32
    torch.testing.assert_close(difference.received().double(), (P - Q).sum(2), atol=1e-4, rtol=1e-3)
    product = difference @ value
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.double(), (P - Q) @ value.double(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(difference.dense().double(), P - Q, atol=1e-5, rtol=1e-5)


def test_probabilities_are_known_of_convex_sums_only() -> None:
    (A, _), (B, _) = attention(1, 2, 5, 5), attention(1, 2, 5, 5, seed=4)
    gate = torch.rand(1, 2, 5, dtype=torch.float64)
    shares = torch.tensor([0.3, 0.6])
    assert (A * 0.25 + 0.75 * B).has_probability_rows
    assert (A * shares + (1 - shares) * B).has_probability_rows
    assert (A.scale_rows(gate) + B.scale_rows(1 - gate)).has_probability_rows
    for other in (
        A + B,
        A - B,
        A * 0.5 + B * 0.25,
        2.0 * A - B,
        A * 0.5 + 0.5 * hidden(torch.rand(1, 2, 5, 5)),
        A * 0.5 + 0.5 * B.T,
    ):
        assert not other.has_probability_rows


def test_one_pass_over_each_part_answers_all_that_was_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(_pass, "evaluate", lambda *a: passes.append(a) or _select.evaluate(*a))
    (A, P), (B, Q) = attention(1, 2, 9, 9), attention(1, 2, 9, 9, seed=4)
    difference, matrix, values, segments = A - 0.8 * B, P - 0.8 * Q, normal(1, 2, 9, 3), {"first": [0]}
    for question in (("received",), ("mass", segments), ("product", values)):
        difference.expect(*question)
    torch.testing.assert_close(difference.received(), matrix.sum(2))
    torch.testing.assert_close(difference.mass(segments), matrix[..., :1])
    torch.testing.assert_close(difference @ values, matrix @ values)
    assert len(passes) == 2
    with pytest.raises(NotImplementedError, match=r"^Sum\(AttentionMap.*Scaled\(.* has no entropy"):
        difference.expect("entropy")


def test_shapes_and_operands_that_do_not_fit() -> None:
    (A, _), (B, _) = attention(1, 2, 5, 5), attention(1, 2, 5, 6)
    with pytest.raises(ValueError, match=r"a sum needs maps of one shape .* got \(1, 2, 5, 5\) and \(1, 2, 5, 6\)"):
        A + B
    with pytest.raises(TypeError, match="unsupported operand"):
        A + torch.zeros(5, 5)
    with pytest.raises(TypeError, match="unsupported operand"):
        A - 1.0
    assert isinstance(A + A, Sum)


def test_parts_are_on_one_device() -> None:
    A, _ = attention(1, 2, 5, 5)
    with pytest.raises(ValueError, match="maps on cpu and meta do not compose"):
        A + Identity(1, 2, 5, device="meta")
