"""Every question about a map under a rule has the answer of the matrix by its definition, with its gradient."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard import AttentionMap, masks
from regard.maps import _blocked, _flex, _plan
from regard.maps._request import Request
from regard.maps._scores import make_scores
from regard.masks._neighbourhood import Neighbourhood
from tests.maps.reference import Call, calls

FEW = settings(max_examples=30, deadline=None, derandomize=True)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of which small calls have many."""
    _plan._kept.cache_clear()
    monkeypatch.setattr(_plan, "_TILE", (8, 4))
    yield
    _plan._kept.cache_clear()


@st.composite
def rules(draw: st.DrawFn, call: Call) -> masks.Mask:
    """A rule, or two combined, for a call."""
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    tokens, generator = max(queries, keys), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    one = draw(st.sampled_from(["window", "documents", "prefix", "strided", "blocks", "neighbourhood", "mask_mod"]))
    rule: masks.Mask
    if one == "window":
        rule = masks.window(draw(st.one_of(st.none(), st.integers(0, 20))), draw(st.integers(0, 9)))
    elif one == "documents":
        rule = masks.documents(ids=torch.randint(0, 4, (batch, tokens), generator=generator).sort(dim=-1).values)
    elif one == "prefix":
        rule = masks.prefix(torch.randint(0, keys + 1, (batch,), generator=generator))
    elif one == "strided":
        rule = masks.strided(draw(st.integers(1, 9)))
    elif one == "blocks":
        chosen = torch.rand(1, heads, tokens // 8 + 1, tokens // 8 + 1, generator=generator) > 0.6
        rule = masks.blocks(chosen, 8)
    elif one == "neighbourhood":
        rule = masks.neighbourhood((tokens // 6 + 1, 6), kernel_size=(1, 3))
    else:
        rule = masks.from_mask_mod(lambda b, h, q, k: (q + k + h) % 3 != 0)
    if draw(st.booleans()):
        rule = draw(st.sampled_from([rule & masks.causal(), rule | masks.window(0, 0), ~rule]))
    return rule


@st.composite
def masked_calls(draw: st.DrawFn) -> tuple[Call, masks.Mask]:
    call = draw(calls())
    return call, draw(rules(call))


def definition(call: Call, rule: masks.Mask) -> Call:
    """The call whose attn_mask holds what the rule hides."""
    batch, heads, queries, _ = call.query.shape
    visible = rule.dense(batch, heads, queries, call.key.shape[2])
    mask = call.attn_mask
    if call.is_causal:
        mask = visible & torch.ones(visible.shape[2:], dtype=torch.bool).tril()
    elif mask is None:
        mask = visible
    elif mask.dtype == torch.bool:
        mask = mask & visible
    else:
        mask = torch.where(visible, mask, -math.inf)
    return replace(call, attn_mask=mask, is_causal=False)


@pytest.mark.parametrize("kernel", ["auto", "dense"])
@FEW
@given(masked=masked_calls(), data=st.data())
def test_every_question(kernel: Any, masked: tuple[Call, masks.Mask], data: st.DataObject) -> None:
    call, rule = masked
    by_definition = definition(call, rule)
    matrix = by_definition.matrix()
    batch, heads, queries, keys = matrix.shape
    key_heads = call.key.shape[1]
    A = AttentionMap(**call.arguments(), mask=rule, kernel=kernel)
    V, W, weights = normal(batch, key_heads, keys, 5), normal(1, heads, queries, 3), normal(1, 1, queries)
    segments: dict[str, Any] = {"first": 0, "half": slice(0, max(1, keys // 2)), "ends": [0, keys - 1]}
    columns = torch.zeros(keys, 3, dtype=torch.float64)
    columns[0, 0] = columns[: max(1, keys // 2), 1] = columns[[0, keys - 1], 2] = 1
    A.expect("entropy")
    A.expect("mass", segments)
    A.expect("received")
    close(A.entropy(), by_definition.entropy(), 2e-5)
    close(A.mass(segments), matrix @ columns)
    close(A.received(), matrix.sum(2))
    close(A.received(weights), (matrix * weights[..., None]).sum(2), 2e-5)
    close(A @ V, matrix @ V.double().repeat_interleave(heads // key_heads, dim=1))
    close(A @ normal(batch, heads, keys, 2), matrix @ normal(batch, heads, keys, 2).double())
    close(A.T @ W, matrix.transpose(-1, -2) @ W.double(), 2e-5)
    logsumexp = by_definition.logsumexp()
    assert torch.equal(A.logsumexp().isneginf(), logsumexp.isneginf())
    close(A.logsumexp()[~logsumexp.isneginf()], logsumexp[~logsumexp.isneginf()])
    targets = torch.randint(-1, keys, (batch, queries), generator=torch.Generator().manual_seed(2))
    index = targets.clamp(min=0)[:, None, :, None].expand(batch, heads, queries, 1)
    close(A.at(targets), matrix.gather(3, index)[..., 0] * (targets >= 0)[:, None])
    rows = data.draw(st.lists(st.integers(0, queries - 1), min_size=1, max_size=4))
    some = slice(0, data.draw(st.integers(1, keys)))
    close(A.tile(rows, some), matrix[:, :, rows][..., some])
    best = A.topk(min(3, keys))
    close(best.shares, matrix.topk(min(3, keys)).values)
    found = best.keys >= 0
    close(matrix.gather(3, best.keys.clamp(min=0))[found], best.shares[found])
    assert torch.equal(found, best.shares > 0)
    distance = (torch.arange(queries)[:, None] - torch.arange(keys)).abs()
    close(A.mean_distance(), (matrix * distance).sum(-1), 1e-4)
    visible = ~by_definition.logits().isneginf()
    close(A.viewers().expand(batch, heads, keys), visible.sum(2))
    close(A.heads([heads - 1, 0]).received(), matrix[:, [heads - 1, 0]].sum(2))


@FEW
@given(masked=masked_calls())
def test_attention_and_its_gradients(masked: tuple[Call, masks.Mask]) -> None:
    call, rule = masked
    value = normal(*call.key.shape[:3], 6)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (call.query, call.key, value)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    arguments = call.arguments() | {"query": inputs[0], "key": inputs[1], "value": inputs[2], "mask": rule}
    output = regard.attention(**arguments)  # type: ignore[arg-type]
    expected = definition(replace(call, query=exact[0], key=exact[1]), rule).matrix()
    expected = expected @ exact[2].repeat_interleave(expected.shape[1] // exact[2].shape[1], dim=1)
    close(output, expected)
    direction = normal(*output.shape)
    for gradient, other in zip(
        torch.autograd.grad(output, inputs, direction),
        torch.autograd.grad(expected, exact, direction.double()),
        strict=True,
    ):
        close(gradient, other, 1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_of_every_question(biased: bool, softcap: float | None) -> None:
    def random(*shape: int) -> Tensor:
        return normal(*shape).double().requires_grad_()

    query, key, V, W = random(2, 4, 9, 8), random(2, 2, 11, 8), random(2, 2, 11, 5), random(2, 4, 9, 3)
    bias, sinks = random(1, 4, 1, 11), random(4)
    rule = masks.window(3, 1) | masks.documents(ids=torch.arange(22).view(2, 11) // 5)

    def outputs(query: Tensor, key: Tensor, bias: Tensor, V: Tensor, W: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        more: dict[str, Any] = {} if softcap is None else {"softcap": softcap, "sinks": sinks}
        A = AttentionMap(query, key, bias if biased else None, enable_gqa=True, mask=rule, **more)
        return (
            A @ V, A.T @ W, A.logsumexp(), A.entropy(), A.received(), A.mass({"two": [0, 3]}), A.at(torch.arange(9)),
            A.rows([2, 5]), A.pool(3, 2),
        )  # fmt: skip

    assert torch.autograd.gradcheck(outputs, (query, key, bias, V, W, sinks), fast_mode=True)


def test_packed_texts_equal_the_texts_one_by_one() -> None:
    lengths = [5, 23, 1, 14]
    texts = [tuple(normal(1, 2, n, 8) * (n + i) ** 0.1 for i in range(3)) for n in lengths]
    packed = [torch.cat([text[i] for text in texts], dim=2) for i in range(3)]
    rule = masks.documents(lengths) & masks.causal()
    together = regard.attention(*packed, mask=rule).split(lengths, dim=2)
    A = AttentionMap(packed[0], packed[1], mask=rule)
    for (q, k, v), output, entropy in zip(texts, together, A.entropy().split(lengths, dim=2), strict=True):
        close(output, regard.attention(q, k, v, is_causal=True))
        close(entropy, AttentionMap(q, k, is_causal=True).entropy())


def test_a_step_of_decoding_is_a_row_of_the_text() -> None:
    q, k, v = normal(1, 2, 40, 8), normal(2, 1, 2, 40, 8)[1], normal(3, 1, 2, 40, 8)[2]
    rule = masks.window(6, 0)
    whole = regard.attention(q, k, v, mask=rule)
    close(regard.attention(q[:, :, 30:31], k, v, mask=rule.offset(query_start=30)), whole[:, :, 30:31])
    late = rule.offset(query_start=30, key_start=20)
    close(regard.attention(q[:, :, 30:], k[:, :, 20:], v[:, :, 20:], mask=late), whole[:, :, 30:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (normal(3, 1, 2, 50, 8)[i].to(dtype) for i in range(3))
    call = definition(Call(q, k, None, False, None), masks.window(9, 0))
    output = regard.attention(q, k, v, mask=masks.window(9, 0))
    assert output.dtype == dtype
    close(output, (call.matrix() @ v.double()).to(dtype), 1e-2)
    close(AttentionMap(q, k, mask=masks.window(9, 0)).entropy(), call.entropy(), 1e-3)


def test_rows_that_see_nothing() -> None:
    q, k, v = normal(3, 1, 2, 20, 8).unbind()
    rule = masks.causal() & ~masks.documents([5, 15])  # the first document's queries see nothing before them
    A = AttentionMap(q, k, mask=rule)
    assert not (A @ v)[:, :, :5].any()
    assert bool(A.logsumexp()[:, :, :5].isneginf().all())
    assert not A.entropy()[:, :, :5].any()
    close(A.received().sum(-1), torch.full((1, 2), 15.0))
    q.requires_grad_()
    assert not torch.autograd.grad(regard.attention(q, k, v, mask=rule).sum(), q)[0][:, :, :5].any()


class Derived(Neighbourhood):
    """No dataclass of its own, so that its settings are not known."""


def evaluations(rule: masks.Mask, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a rule is evaluated, at each of three calls under it that differ in all but their shape."""
    made, visible = [], Neighbourhood.visible

    def counting(self: Neighbourhood, *positions: Tensor) -> Tensor:
        made.append(self)
        return visible(self, *positions)

    monkeypatch.setattr(Neighbourhood, "visible", counting)
    counts, matrix = [], None
    for seed in range(3):
        q, k, v = torch.randn(3, 1, 2, 35, 8, generator=torch.Generator().manual_seed(seed)).unbind()
        made.clear()
        with torch.inference_mode(seed == 0):
            output = regard.attention(q, k, v, mask=rule)
        counts.append(len(made))
        matrix = rule.dense(1, 2, 35, 35) if matrix is None else matrix
        close(output, torch.nn.functional.scaled_dot_product_attention(q, k, v, matrix))
    return counts


def test_a_rule_of_numbers_is_evaluated_once_for_all_calls_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = masks.neighbourhood((5, 7), 3)
    first, *later = evaluations(rule, monkeypatch)
    assert first
    assert later == [0, 0]
    assert evaluations(masks.neighbourhood((5, 7), 3), monkeypatch) == [0, 0, 0]
    assert evaluations(masks.neighbourhood((5, 7), 5), monkeypatch)[0]


def test_a_rule_that_may_change_is_evaluated_at_each_call() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8).unbind()
    chosen = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    rule = masks.blocks(chosen, 4) & masks.causal()
    for _ in range(2):
        hidden = rule.dense(1, 2, 20, 20)
        close(regard.attention(q, k, v, mask=rule), torch.nn.functional.scaled_dot_product_attention(q, k, v, hidden))
        chosen[..., 1:, 0] = False


MORE_THAN_NUMBERS = (
    masks.documents([3, 4]),
    masks.prefix(3) & masks.causal(),
    ~masks.blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), 4),
    masks.causal().heads([0, 0]),
    Derived((5,), (3,), (1,), (1,), (False,)),
)


@pytest.mark.parametrize("rule", MORE_THAN_NUMBERS)
def test_rules_that_are_more_than_numbers_have_no_settings(rule: masks.Mask) -> None:
    assert rule.settings is None


def test_shared_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head's strips in several workers add to the same keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    q, k, v = (tensor.requires_grad_() for tensor in normal(3, 1, 1, 90, 8).unbind())
    rule = masks.window(20, 5)
    assert len(_blocked._plan(make_scores(q, k, None, False, None, False, rule=rule), q.dtype).shares(3)) > 1
    gradients = torch.autograd.grad(regard.attention(q, k, v, mask=rule).square().sum(), (q, k, v))
    matrix = torch.softmax(
        (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~rule.dense(1, 1, 90, 90), -math.inf), dim=-1
    )
    close(AttentionMap(q, k, mask=rule).received(), matrix.sum(2))
    for gradient, other in zip(gradients, torch.autograd.grad((matrix @ v).square().sum(), (q, k, v)), strict=True):
        close(gradient, other)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode is that of its own thread
    try:
        with Largest() as found:
            yield found
    finally:
        torch.set_num_threads(threads)


def test_nothing_of_the_size_of_the_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # tiles as they are
    q, k, v = (tensor.requires_grad_() for tensor in normal(3, 1, 1, 4096, 8).unbind())
    for rule in (masks.window(128, 0), masks.documents([100] * 40 + [96]) & masks.causal()):
        with largest() as found:
            A = AttentionMap(q, k, mask=rule)
            for question in (("entropy",), ("received",), ("product", v)):
                A.expect(*question)
            answers = (A @ v, A.entropy(), A.received(), A.topk(3).shares, A.mean_distance(), A.viewers())
            torch.autograd.grad(sum(answer.sum() for answer in answers[:3]), (q, k, v))
        assert found.entries < 4096 * 4096 / 16, rule


def test_flex_attention_gives_the_same() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = normal(1, 4, 70, 16), normal(1, 2, 70, 16), normal(2, 1, 2, 70, 16)[1]
    for rule in (
        masks.window(9, 0),
        masks.documents([30, 40]) & masks.causal(),
        masks.neighbourhood((7, 10), (3, 5), stride=(1, 2)),
        masks.prefix(12),
    ):
        scores = make_scores(q, k, None, False, None, True, rule=rule)
        answer = _flex.evaluate(scores, Request(torch.float32, values=v), flex_attention)
        A = AttentionMap(q, k, enable_gqa=True, mask=rule)
        assert answer.forward is not None
        close(A @ v, answer.forward)
        close(A.logsumexp(), answer.logsumexp)


def test_masks_that_are_refused() -> None:
    q = normal(1, 2, 10, 8)
    for error, message, arguments in (
        (TypeError, "rule of regard.masks.*got a tensor of shape", {"mask": torch.ones(10, 10)}),
        (ValueError, "documents: of 7 tokens, but the call reaches 10", {"mask": masks.documents([3, 4])}),
        (ValueError, "the tiled kernel visits every pair", {"mask": masks.causal(), "kernel": "tiled"}),
    ):
        with pytest.raises(error, match=message):
            AttentionMap(q, q, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"value must be \(1, 2, 10, width\).*got \(1, 2, 9, 8\)"):
        regard.attention(q, q, normal(1, 2, 9, 8), mask=masks.causal())
