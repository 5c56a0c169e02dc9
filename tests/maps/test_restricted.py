"""Some rows and some keys of a map."""

from typing import Any

import pytest
import torch

from regard import AttentionMap, masks
from regard.maps import attention_map
from tests.maps.answers import attention, check_answers, check_gradients, hidden, normal


@pytest.mark.parametrize("is_causal", [True, False])
def test_restrictions(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    A, P = attention(2, 3, 9, 6, is_causal=is_causal)
    rows, keys = [7, 2, 2, -1], [5, 0, 3]
    check_answers(A.restrict(slice(2, 6)), P[:, :, 2:6])
    check_answers(A.restrict(slice(0, 6)), P[:, :, :6])
    check_answers(A.restrict(slice(5, 6)), P[:, :, 5:6])
    check_answers(A.restrict(rows, keys), P[:, :, rows][..., keys])
    check_answers(A.restrict(keys=slice(1, 4)), P[..., 1:4])
    check_answers(A.restrict(slice(1, 8), keys).restrict([3, 1], [2, 0]), P[:, :, [4, 2]][..., [3, 5]])
    check_answers(hidden(P).restrict(rows, keys), P[:, :, rows][..., keys])
    monkeypatch.setattr(attention_map, "_ENTRIES_AT_ONCE", 1)
    check_answers(A.restrict(rows), P[:, :, rows])
    assert A.restrict(slice(None), slice(None)) is A


@pytest.mark.parametrize("kernel", ["dense", "tiled", "fused"])
def test_rows_of_attention_keep_what_a_softmax_has(kernel: str) -> None:
    query, key, mask = normal(2, 3, 9, 6), normal(2, 3, 8, 6), normal(2, 1, 9, 8)
    weights = torch.rand(1, 1, 4, dtype=torch.float64)
    for arguments, visible in (
        ({"is_causal": True}, torch.ones(9, 8).tril().bool()),
        ({"attn_mask": mask > 0}, mask > 0),
        ({"attn_mask": mask}, torch.ones(9, 8).bool()),
    ):
        A = AttentionMap(query, key, **arguments, kernel=kernel)
        for rows in (slice(0, 4), slice(3, 7), [8, 0, 3, 3]):
            part = A.restrict(rows)
            assert part.has_logits
            assert part.has_probability_rows
            torch.testing.assert_close(part.logsumexp(), A.logsumexp()[:, :, rows])
            torch.testing.assert_close(part.entropy(), A.entropy()[:, :, rows])
            seen = visible.double().expand(2, 3, 9, 8)[:, :, rows]
            torch.testing.assert_close(part.viewers(weights).expand(2, 3, 8), (seen * weights[..., None]).sum(2))
    assert not A.restrict(keys=[0]).has_logits
    assert not A.restrict(keys=[0]).has_probability_rows


@pytest.mark.parametrize("rows", [slice(1, 4), [3, 1, 2], slice(0, 3)])
def test_gradients(rows: object) -> None:
    def restricted(query, key):
        return AttentionMap(query, key, is_causal=True).restrict(rows, [3, 0])

    check_gradients(restricted, normal(1, 2, 4, 3), normal(1, 2, 5, 3, seed=2))


@pytest.mark.parametrize("extra", ["rule", "softcap", "sinks", "sinks of rows"])
@pytest.mark.parametrize("rows", [slice(0, 4), slice(3, 7), [8, 0, 3]])
def test_rows_of_attention_with_more_than_a_mask(extra: str, rows: Any) -> None:
    query, key, value = normal(2, 3, 9, 6), normal(2, 3, 9, 6, seed=2), normal(2, 3, 9, 4)
    arguments: dict[str, dict[str, Any]] = {
        "rule": {"mask": masks.window(left=3, right=1)},
        "softcap": {"softcap": 2.0, "is_causal": True},
        "sinks": {"sinks": torch.tensor([0.0, 1.0, 2.0]), "is_causal": True},
        "sinks of rows": {"sinks": normal(1, 3, 9)},
    }
    A = AttentionMap(query, key, **arguments[extra])
    part = A.restrict(rows)
    torch.testing.assert_close(part @ value, (A @ value)[:, :, rows])
    torch.testing.assert_close(part.dense(), A.dense()[:, :, rows])
    torch.testing.assert_close(part.T @ value[:, :, rows], A.dense()[:, :, rows].mT @ value[:, :, rows])
    torch.testing.assert_close(part.logsumexp(), A.logsumexp()[:, :, rows])


def test_neighbouring_rows_of_a_triangle_store_no_mask() -> None:
    query = torch.randn(1, 1, 20_000, 4)
    part = AttentionMap(query, query, is_causal=True).restrict(slice(5000, 20_000))
    assert isinstance(part, AttentionMap)
    assert part._scores.mask is None


def test_positions_that_are_not_there() -> None:
    A, _ = attention(1, 2, 5, 6)
    with pytest.raises(IndexError, match="rows names position 5, but there are 5 queries"):
        A.restrict([5])
    with pytest.raises(ValueError, match="keys is empty"):
        A.restrict(keys=[])
