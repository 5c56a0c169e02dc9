"""Every answer of a map, held to the stored matrix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regard import AttentionMap
from regard.maps import TokenMap
from regard.mixers import HiddenMap


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(*shape: int, seed: int = 1, is_causal: bool = True) -> tuple[AttentionMap, Tensor]:
    """A map of this shape, and its matrix by the definition, in float64."""
    batch, heads, queries, keys = shape
    query, key = normal(batch, heads, queries, 6, seed=seed), normal(batch, heads, keys, 6, seed=seed + 1)
    logits = query @ key.mT / 6**0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -torch.inf)
    return AttentionMap(query, key, is_causal=is_causal), logits.softmax(-1)


def hidden(matrix: Tensor) -> HiddenMap:
    """A map that is known by its products alone."""
    values = torch.zeros(*matrix.shape[:2], matrix.shape[3], 1, dtype=matrix.dtype)
    return HiddenMap(lambda v: matrix @ v, tuple(matrix.shape), values)


def check_answers(A: TokenMap, matrix: Tensor, tolerance: float = 1e-9) -> None:
    """Ask everything there is."""

    def close(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype == A.dtype
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)

    batch, heads, queries, keys = matrix.shape
    assert A.shape == matrix.shape
    check_products(A, matrix, close)
    check_products(A.T, matrix.mT, close)

    close(A.dense(), matrix)
    rows, few = [queries - 1, 0, queries // 2], [keys - 1, 0]
    close(A.rows(rows), matrix[:, :, rows])
    close(A.rows(slice(queries // 2, queries)), matrix[:, :, queries // 2 :])
    close(A.tile(slice(None), few), matrix[..., few])
    close(A.tile(rows, few), matrix[:, :, rows][..., few])
    close(A.tile([0], list(range(keys))[::-1]), matrix[:, :, [0]].flip(3))
    close(A.T.rows(few), matrix.mT[:, :, few])
    targets = torch.randint(-1, keys, (batch, queries), generator=torch.Generator().manual_seed(2))
    index = targets.clamp(min=0)[:, None, :, None].expand(batch, heads, queries, 1)
    close(A.at(targets), matrix.gather(3, index)[..., 0] * (targets >= 0)[:, None])
    ends = sorted({heads - 1, 0}, reverse=True)
    close(A.heads(ends).received(), matrix[:, ends].sum(2))

    k = (keys + 1) // 2
    best = A.topk(k)
    close(best.shares, matrix.topk(k).values)
    found = best.keys >= 0
    close(matrix.gather(3, best.keys.clamp(min=0))[found], best.shares[found])
    assert not best.shares[~found].any()
    close(A.max(), matrix.amax(-1))
    distance = (torch.arange(queries)[:, None] + 3 - torch.arange(keys) - 1).abs()
    close(A.mean_distance(query_start=3, key_start=1), (matrix * distance).sum(-1))

    close(A.diagonals([0, -2, 1])[..., 0], _padded(matrix.diagonal(0, 2, 3), queries))
    close(A.diagonals([0, -1])[:, :, 1:, 1], _padded(matrix.diagonal(-1, 2, 3), queries - 1))

    if A.has_probability_rows:
        assert bool((matrix >= 0).all())
        assert bool((matrix.sum(-1) <= 1 + 1e-5).all())
        close(A.entropy(), torch.special.entr(matrix).sum(-1))
    else:
        with pytest.raises(NotImplementedError, match="has no entropy: its rows are no probabilities"):
            A.entropy()
    if not A.has_logits:
        with pytest.raises(NotImplementedError, match=r"has no logsumexp: .* It has products, received"):
            A.logsumexp()
        with pytest.raises(NotImplementedError, match="has no viewers: "):
            A.viewers()


def check_products(A: TokenMap, matrix: Tensor, close: Callable[[Tensor, Tensor], None]) -> None:
    """What is asked of a whole matrix from the side of its keys, and pictures of it."""
    batch, heads, queries, keys = matrix.shape
    assert A.shape == matrix.shape
    own, shared = normal(batch, heads, keys, 3), normal(1, 1, keys, 2)
    close(A @ own, matrix @ own)
    close(A @ shared, matrix @ shared)
    weights = normal(1, heads, queries)
    close(A.received(), matrix.sum(2))
    close(A.received(weights), (matrix * weights[..., None]).sum(2))
    mask = torch.arange(batch * keys).view(batch, keys) % 3 == 0
    mass = A.mass({"ends": [0, keys - 1], "half": slice(0, (keys + 1) // 2), "mask": mask})
    close(mass[..., 0], matrix[..., list({0, keys - 1})].sum(-1))
    close(mass[..., 1], matrix[..., : (keys + 1) // 2].sum(-1))
    close(mass[..., 2], (matrix * mask[:, None, None]).sum(-1))
    close(A.pool(1, keys), matrix.sum(2, keepdim=True))
    first, last = queries // 3, keys - keys // 3
    of_queries, of_keys = torch.arange(queries) // 3, torch.arange(keys) // 2
    rows, columns = (torch.nn.functional.one_hot(blocks).double() for blocks in (of_queries, of_keys))
    close(A.block_sums(of_queries, of_keys, weights), rows.mT @ (matrix * weights[..., None]) @ columns)
    part = A.pool(queries - first, 1, rows=slice(first, queries), columns=slice(0, last))
    close(part, matrix[:, :, first:, :last].sum(-1, keepdim=True))


def _padded(diagonal: Tensor, queries: int) -> Tensor:
    """With zeros for the queries that have no such key."""
    return torch.nn.functional.pad(diagonal, (0, queries - diagonal.shape[-1]))


def check_gradients(compose: Callable[..., TokenMap], *inputs: Tensor) -> None:
    """Every differentiable answer has the gradients of finite differences in what the map is made of."""

    def answers(*inputs: Tensor) -> tuple[Tensor, ...]:
        A = compose(*inputs)
        _, _, queries, keys = A.shape
        return (
            A @ normal(1, 1, keys, 2), A.T @ normal(1, 1, queries, 2), A.received(), A.received(normal(1, 1, queries)),
            A.mass({"first": [0]}), A.pool(2, 1), A.pool(1, 1, rows=slice(1, 3), columns=slice(0, 2)),
            A.block_sums(torch.arange(queries) // 2, torch.arange(keys) // 2),
            A.at(torch.arange(queries) % keys), A.rows([1, 0]), A.tile(slice(0, 3), [1]),
        )  # fmt: skip

    assert torch.autograd.gradcheck(answers, [x.detach().requires_grad_() for x in inputs], fast_mode=True)
