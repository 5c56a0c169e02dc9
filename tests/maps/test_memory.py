"""Whatever a map is composed of, nothing of the matrix's size is made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard import AttentionMap
from regard.maps import ConcatenatedHeads, TokenMap, attention_map, mixed_heads, token_map
from regard.mixers import HiddenMap

TOKENS = 1024
MATRIX = TOKENS**2


class Largest(TorchDispatchMode):
    """The largest storage, in numbers of float32, behind any tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_map, mixed_heads):
        monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 2**16)
    monkeypatch.setattr(attention_map, "_ENTRIES_AT_ONCE", 2**16)


def maps(query: Tensor) -> dict[str, TokenMap]:
    A = AttentionMap(query, query.flip(2), is_causal=True)
    B = AttentionMap(query.flip(2), query, torch.arange(TOKENS).expand(1, 1, 1, TOKENS) % 7 > 0)
    H = HiddenMap(lambda v: v.cumsum(2), A.shape, torch.zeros(1, 2, TOKENS, 1))
    gates = torch.rand(1, 2, TOKENS)
    return {
        "attention": A,
        "differential": (A - 0.8 * B).scale_rows(gates),
        "rollout": A.mean_heads().residual(0.5) @ B.mean_heads().residual(0.5),
        "talking": A.mix_heads(torch.randn(3, 2)) @ H.mix_heads(torch.randn(3, 2)),
        "transposed": A.T.scale_keys(gates),
        "restricted": ConcatenatedHeads(A, H).restrict(slice(200, 1000), slice(100, 1000)),
    }


NAMES = tuple(maps(torch.zeros(1, 2, TOKENS, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_makes_a_matrix(name: str, small_strips: None) -> None:
    A = maps(torch.randn(1, 2, TOKENS, 4))[name]
    _, heads, queries, keys = A.shape
    with Largest() as largest:
        _ = A @ torch.randn(1, heads, keys, 4), A.T @ torch.randn(1, heads, queries, 4)
        A.received(), A.mass({"first": [0]}), A.pool(4, 4), A.pool(4, 4, rows=slice(300, 600), columns=slice(9, 90))
        A.at(torch.zeros(queries, dtype=torch.long)), A.rows([5, 90]), A.tile(slice(None), [5, 90])
        A.topk(2), A.mean_distance()
        if A.has_probability_rows:
            A.entropy()
        if A.has_logits:
            A.logsumexp(), A.viewers(), A.restrict(slice(9, 1000)).viewers()
    assert largest.numbers < MATRIX


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_keeps_a_matrix(name: str, small_strips: None) -> None:
    query = torch.randn(1, 2, TOKENS, 4, requires_grad=True)
    A = maps(query)[name]
    _, _, queries, keys = A.shape
    questions: tuple[Callable[[], Tensor], ...] = (
        lambda: A @ torch.randn(1, 1, keys, 4),
        A.received,
        lambda: A.pool(4, 4),
        lambda: A.at(torch.zeros(queries, dtype=torch.long)),
        lambda: A.tile(slice(None), [5, 90]),
    )
    for ask in questions:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = ask()
        assert sum(kept.values()) < MATRIX
    (gradient,) = torch.autograd.grad(answer.sum(), query)
    assert bool(gradient.isfinite().all())
