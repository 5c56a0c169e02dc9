"""Answers come in the map's precision, whatever autocast would make of them, and never with a wrong tangent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard import AttentionMap
from regard.maps import TokenMap
from tests.maps.answers import hidden

QUESTIONS: dict[str, Callable[[TokenMap], Tensor]] = {
    "product": lambda A: A @ torch.linspace(-1, 1, 40).expand(1, 2, 40, 40),
    "transposed": lambda A: A.T @ torch.linspace(-1, 1, 40).expand(1, 2, 40, 40),
    "received": lambda A: A.received(torch.linspace(-1, 1, 40)[None, None]),
    "mass": lambda A: A.mass({"some": slice(3, 9)}),
    "pool": lambda A: A.pool(3, 5),
    "at": lambda A: A.at(torch.arange(40) - 1),
    "rows": lambda A: A.rows([3, 20]),
    "tile": lambda A: A.tile(slice(None), [3, 20]),
    "dense": lambda A: A.dense(),
    "topk": lambda A: A.topk(3).shares,
    "mean distance": lambda A: A.mean_distance(),
    "rows of their own": lambda A: A.restrict(slice(5, 25)).received(),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("composed", ["attention", "mixture", "product", "hidden"])
def test_autocast_changes_nothing(question: str, composed: str) -> None:
    query, key = 4 * torch.randn(2, 1, 2, 40, 16)
    A = AttentionMap(query, key, is_causal=True)
    matrix = A.dense()
    maps: dict[str, TokenMap] = {
        "attention": A,
        "mixture": A.mix_heads(torch.rand(2, 2)).scale_rows(torch.rand(40)) - 0.3 * A,
        "product": A.residual(0.5) @ A.T,
        "hidden": hidden(matrix),
    }
    ask = QUESTIONS[question]
    plain = ask(maps[composed])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ask(maps[composed]), plain)


def test_viewers_under_autocast() -> None:
    mask = torch.rand(1, 1, 300, 300) > 0.01
    A = AttentionMap(torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(A.viewers(), mask.sum(2).float())


@pytest.mark.parametrize("size", [1e4, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_of_large_logits(size: float, dtype: torch.dtype) -> None:
    """exp(s − L) needs L in the precision of s: rounded to float32, it moved entries by 5 in 100."""
    query, key = torch.randn(2, 1, 2, 50, 16, dtype=dtype)
    query[:, :, 1] = query[:, :, 0]
    key[:, :, 1] = key[:, :, 0]  # rows that are shared by two keys: nowhere 0 or 1
    query *= size / float((query @ key.mT).abs().max() / 4)
    matrix = (query.double() @ key.double().mT / 4).softmax(-1)
    best = matrix.argmax(-1)[0, 0]
    A = AttentionMap(query, key)
    expected = matrix[:, :, torch.arange(50), best]
    torch.testing.assert_close(A.at(best).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(A.tile(slice(None), [0, 1]).double(), matrix[..., :2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bound", [95.0, 105.0])
def test_logits_of_pretrained_models_need_no_double(bound: float) -> None:
    query, key = torch.randn(2, 1, 4, 300, 64)
    query[:, 0], key[:, 1] = 100 * query[:, 0], key[:, 1] / 100  # what one head has does not count for another
    key[:, 0] /= 100
    query *= bound / float((query.norm(dim=-1).amax(-1) * key.norm(dim=-1).amax(-1)).amax() / 8)
    A = AttentionMap(query, key, kernel="tiled")
    matrix = (query.double() @ key.double().mT / 8).softmax(-1)
    error = (A.dense() - matrix).abs() / matrix
    assert bool((error[matrix > 1e-4] < (2e-5 if bound < 100 else 1e-6)).all())
    torch.testing.assert_close(A.entropy().double(), torch.special.entr(matrix).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["dense", "tiled", "fused", "auto"])
def test_forward_mode_is_refused(kernel: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 8)
    A = AttentionMap(query, key, kernel=kernel)
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(query, torch.ones_like(query))
        for ask in (
            lambda: AttentionMap(tangent, key, kernel=kernel),
            lambda: AttentionMap(query, tangent, kernel=kernel),
            lambda: AttentionMap(query, key, tangent[..., :1], kernel=kernel),
            lambda: A @ tangent,
            lambda: A.T @ tangent,
            lambda: A.received(tangent[..., 0]),
        ):
            with pytest.raises(NotImplementedError, match="no forward-mode tangents"):
                ask()
    with pytest.raises(NotImplementedError, match="no forward-mode tangents"):
        torch.func.jvp(lambda v: A @ v, (value,), (value,))
