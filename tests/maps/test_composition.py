"""Maps composed of maps, three deep, have the answers of matrices composed so."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard import AttentionMap
from regard.maps import ConcatenatedHeads, Identity, TokenMap, mixed_heads, token_map
from tests.maps.answers import attention, check_answers, hidden, normal

Shape = tuple[int, int, int, int]
Pair = tuple[TokenMap, Tensor]
OPERATORS = (
    "sum", "difference", "number", "heads", "rows", "keys", "product", "residual", "mix", "mean", "transposed",
    "restricted", "side by side", "some heads",
)  # fmt: skip


@st.composite
def attention_maps(draw: st.DrawFn, shape: Shape) -> Pair:
    """Grouped heads, a mask of any form, rows that see nothing."""
    batch, heads, queries, keys = shape
    groups = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    seed = draw(st.integers(0, 1000))
    query, key = normal(batch, heads, queries, 4, seed=seed), normal(batch, heads // groups, keys, 4, seed=seed + 1)
    logits = query @ key.repeat_interleave(groups, dim=1).mT / 2
    kind, mask = draw(st.sampled_from(["none", "causal", "boolean", "additive"])), None
    if kind == "causal":
        logits = logits.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -math.inf)
    elif kind != "none":
        sizes = [draw(st.sampled_from([1, n])) for n in shape]
        mask = normal(*sizes, seed=seed + 2) > -0.5
        if kind == "additive":
            mask = torch.where(mask, normal(*sizes, seed=seed + 3), -math.inf)
        logits = logits.masked_fill(~mask, -math.inf) if kind == "boolean" else logits + mask
    total = logits.logsumexp(-1, keepdim=True)
    A = AttentionMap(query, key, mask, kind == "causal", enable_gqa=True)
    return A, torch.exp(logits - total.masked_fill(total.isneginf(), 0.0))


@st.composite
def composed(draw: st.DrawFn, shape: Shape, depth: int) -> Pair:
    """A map of this shape, of so many layers of composition, and its matrix."""
    batch, heads, queries, keys = shape
    seed = draw(st.integers(0, 1000))

    def part(*shape: int) -> Pair:
        return draw(composed(shape, depth - 1))

    if depth == 0:
        kind = draw(st.sampled_from(["attention", "hidden", "identity"]))
        if kind == "attention":
            return draw(attention_maps(shape))
        if kind == "identity" and queries == keys:
            return Identity(batch, heads, queries, torch.float64), torch.eye(queries).double().repeat(
                batch, heads, 1, 1
            )
        matrix = normal(*shape, seed=seed)
        return hidden(matrix), matrix
    operator = draw(st.sampled_from(OPERATORS))
    if operator in ("sum", "difference"):
        (A, P), (B, Q) = part(*shape), part(*shape)
        return (A + B, P + Q) if operator == "sum" else (A - B, P - Q)
    if operator == "product":
        inner = draw(st.integers(1, 6))
        (A, P), (B, Q) = part(batch, heads, queries, inner), part(batch, heads, inner, keys)
        return A @ B, P @ Q
    if operator == "mix" or (operator == "mean" and heads == 1):
        more = draw(st.integers(1, 3))
        A, P = part(batch, more, queries, keys)
        if operator == "mean":
            return A.mean_heads(), P.mean(1, keepdim=True)
        weights = normal(*draw(st.sampled_from([(batch,), (1,), ()])), heads, more, seed=seed)
        return A.mix_heads(weights), torch.einsum("boh,bhnm->bonm", weights.expand(batch, heads, more), P)
    if operator == "transposed":
        A, P = part(batch, heads, keys, queries)
        return A.T, P.mT
    if operator == "restricted":
        A, P = part(batch, heads, queries + 2, keys + 2)
        first = draw(st.integers(0, 2))
        rows = draw(st.sampled_from([slice(first, first + queries), list(range(queries))[::-1]]))
        some = draw(st.sampled_from([slice(2, 2 + keys), [0, *range(2, keys + 1)][:keys]]))
        return A.restrict(rows, some), P[:, :, rows][..., some]
    if operator == "side by side" and heads > 1:
        (A, P), (B, Q) = part(batch, 1, queries, keys), part(batch, heads - 1, queries, keys)
        return ConcatenatedHeads(A, B), torch.cat([P, Q], 1)
    if operator == "some heads":
        A, P = part(batch, heads + 1, queries, keys)
        return A.heads(list(range(heads, 0, -1))), P[:, list(range(heads, 0, -1))]
    A, P = part(*shape)
    if operator == "residual" and queries == keys:
        alpha = draw(st.sampled_from([0.5, 0.9]))
        return A.residual(alpha), alpha * P + (1 - alpha) * torch.eye(queries).double()
    if operator == "heads":
        factors = normal(*draw(st.sampled_from([(heads,), (1, heads), (batch, heads)])), seed=seed)
        return factors * A, factors.reshape(-1, heads, 1, 1) * P
    if operator == "rows":
        factors = normal(*draw(st.sampled_from([(queries,), (1, heads, queries), (batch, 1, queries)])), seed=seed)
        return A.scale_rows(factors), factors[..., None] * P
    if operator == "keys":
        factors = normal(*draw(st.sampled_from([(keys,), (1, heads, keys), (batch, 1, keys)])), seed=seed)
        return A.scale_keys(factors), factors[..., None, :] * P
    return (-A, -P) if operator == "residual" else (A * 0.5, P * 0.5)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_answer_of_every_composition(data: st.DataObject) -> None:
    queries = data.draw(st.integers(3, 8))
    keys = data.draw(st.sampled_from([queries, 5]))
    shape = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4)), queries, keys
    A, matrix = data.draw(composed(shape, data.draw(st.integers(1, 3))))
    numbers = data.draw(st.sampled_from([1, 60, 2**22]))  # strips of one row, of some rows, of all
    with patch.object(token_map, "_NUMBERS_AT_ONCE", numbers), patch.object(mixed_heads, "_NUMBERS_AT_ONCE", numbers):
        check_answers(A, matrix)


@pytest.mark.parametrize("question", ["entropy", "mass"])
def test_what_is_expected_is_answered_alike(question: str) -> None:
    segments = {"first": [0], "others": slice(1, None)}

    def made() -> list[TokenMap]:
        A, B = (attention(2, 2, 6, 6, seed=seed)[0] for seed in (1, 5))
        return [
            A.restrict([4, 1]),
            ConcatenatedHeads(A, B),
            A.mix_heads(torch.eye(2, dtype=torch.float64).flip(0)),
            A.heads([1]),
        ]

    for plain, told in zip(made(), made(), strict=True):
        if question == "entropy" and not plain.has_probability_rows:
            continue
        arguments: tuple[object, ...] = (segments,) if question == "mass" else ()
        told.expect(question, *arguments)
        wanted, found = (getattr(one, question)(*arguments) for one in (plain, told))
        torch.testing.assert_close(found, wanted)


def test_viewers_of_some_rows() -> None:
    A, P = attention(1, 2, 6, 6)
    torch.testing.assert_close(A.restrict([4, 1, 1]).viewers(), (P[:, :, [4, 1, 1]] > 0).double().sum(2)[:, :1])
