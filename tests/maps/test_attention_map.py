"""Every question about a map, on every kernel, has the answer of the matrix by its definition."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard import AttentionMap
from regard.maps import _fused, _pass, _select, _tiled
from tests.maps.reference import Call, calls

KERNELS = ("dense", "tiled", "fused", "auto")
FEW = settings(max_examples=40, deadline=None)
HALF = (torch.bfloat16, torch.float16)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", KERNELS)
@FEW
@given(call=calls())
def test_products(kernel: Any, call: Call) -> None:
    matrix = call.matrix()
    batch, heads, queries, keys = matrix.shape
    A = AttentionMap(**call.arguments(), kernel=kernel)
    key_heads = call.key.shape[1]
    V, per_head = normal(batch, key_heads, keys, 30), normal(batch, heads, keys, 3)
    W = normal(1, heads, queries, 5)
    assert A.shape == matrix.shape
    close(A @ V, matrix @ V.double().repeat_interleave(heads // key_heads, dim=1))
    close(A @ per_head, matrix @ per_head.double())
    close(A.T @ W, matrix.transpose(-1, -2) @ W.double(), 2e-5)
    assert A.T.shape == (batch, heads, keys, queries)
    assert A.T.T is A


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("together", [True, False])
@FEW
@given(call=calls())
def test_statistics(kernel: Any, together: bool, call: Call) -> None:
    matrix = call.matrix()
    batch, _, queries, keys = matrix.shape
    A = AttentionMap(**call.arguments(), kernel=kernel)
    segments: dict[str, Any] = {
        "first": 0,
        "half": slice(0, max(1, keys // 2)),
        "some": [0, keys - 1],
        "mask": torch.arange(batch * keys).view(batch, keys) % 3 == 0,
    }
    columns = torch.zeros(batch, keys, 4, dtype=torch.float64)
    columns[:, 0, 0] = columns[:, : max(1, keys // 2), 1] = columns[:, [0, keys - 1], 2] = 1
    columns[:, :, 3] = segments["mask"]
    weights = normal(1, 1, queries)
    if together:
        A.expect("entropy")
        A.expect("mass", segments)
        A.expect("received")
        A.expect("received", weights)
    close(A.entropy(), call.entropy(), 2e-5)
    close(A.mass(segments), matrix @ columns[:, None])
    close(A.received(), matrix.sum(2), 1e-5)
    close(A.received(weights), (matrix * weights[..., None]).sum(2), 2e-5)
    assert torch.equal(A.logsumexp().isneginf(), call.logsumexp().isneginf())
    seen = ~call.logsumexp().isneginf()
    close(A.logsumexp()[seen], call.logsumexp()[seen])


@FEW
@given(call=calls(), data=st.data())
def test_entries_and_pictures(call: Call, data: st.DataObject) -> None:
    matrix = call.matrix()
    batch, heads, queries, keys = matrix.shape
    A = AttentionMap(**call.arguments())
    close(A.dense(), matrix)
    targets = torch.randint(-1, keys, (batch, queries), generator=torch.Generator().manual_seed(2))
    index = targets.clamp(min=0)[:, None, :, None].expand(batch, heads, queries, 1)
    close(A.at(targets), matrix.gather(3, index)[..., 0] * (targets >= 0)[:, None])
    close(A.at(targets[0]), AttentionMap(**call.arguments()).at(targets[:1].expand(batch, -1)))
    rows = data.draw(st.lists(st.integers(-queries, queries - 1), min_size=1, max_size=4))
    close(A.rows(rows), matrix[:, :, rows])
    columns = slice(0, data.draw(st.integers(1, keys)))
    close(A.tile(rows, columns), matrix[:, :, rows][..., columns])
    n, m = data.draw(st.integers(1, queries)), data.draw(st.integers(1, keys))
    pooled = torch.zeros(batch, heads, n, m, dtype=torch.float64)
    for i in range(queries):
        for j in range(keys):
            pooled[:, :, i * n // queries, j * m // keys] += matrix[:, :, i, j]
    close(A.pool(n, m), pooled, 2e-5)
    k = data.draw(st.integers(1, keys))
    best = A.topk(k)
    close(best.shares, matrix.topk(k).values)
    found = best.keys >= 0
    close(matrix.gather(3, best.keys.clamp(min=0))[found], best.shares[found])
    assert torch.equal(found, best.shares > 0)
    close(A.max(), matrix.amax(-1))
    distance = (torch.arange(queries)[:, None] + 3 - torch.arange(keys)).abs()
    close(A.mean_distance(query_start=3), (matrix * distance).sum(-1), 1e-4)
    visible = ~call.logits().isneginf()
    close(A.viewers().expand(batch, heads, keys), visible.sum(2))


@pytest.mark.parametrize("kernel", ["tiled", "fused", "auto"])
@FEW
@given(call=calls(HALF))
def test_half_precision(kernel: Any, call: Call) -> None:
    """On the same half-precision inputs statistics are good to 1e-3 of the float64 result."""
    matrix, entropy, logsumexp = call.matrix(), call.entropy(), call.logsumexp()
    A = AttentionMap(**call.arguments(), kernel=kernel)
    segments = {"first": [0], "all": slice(None)}
    seen = ~logsumexp.isneginf()
    assert A.entropy().dtype == A.received().dtype == torch.float32
    torch.testing.assert_close(A.logsumexp()[seen].double(), logsumexp[seen], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(A.entropy().double(), entropy, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(A.received().double(), matrix.sum(2), rtol=1e-3, atol=1e-6)
    mass = torch.stack([matrix[..., 0], matrix.sum(-1)], dim=-1)
    torch.testing.assert_close(A.mass(segments).double(), mass, rtol=1e-3, atol=1e-6)
    V = normal(*call.key.shape).to(call.key.dtype)
    assert (A @ V).dtype == V.dtype


@FEW
@given(call=calls((torch.float64,)))
def test_double_precision(call: Call) -> None:
    A = AttentionMap(**call.arguments())
    close(A.entropy(), call.entropy(), 1e-12)
    close(A.received(), call.matrix().sum(2), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["tiled", "fused"])
def test_gradients_are_those_of_the_definition(causal: bool, kernel: Any) -> None:
    def random(*shape: int) -> Tensor:
        return normal(*shape).double().requires_grad_()

    query, key, V, W = random(2, 4, 9, 8), random(2, 2, 11, 8), random(2, 2, 11, 5), random(2, 4, 9, 3)
    bias = random(1, 4, 1, 11)

    def outputs(query: Tensor, key: Tensor, bias: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, ...]:
        A = AttentionMap(query, key, None if causal else bias, causal, enable_gqa=True, kernel=kernel)
        targets = torch.arange(9) - 1
        return (
            A @ V, A.T @ W, A.logsumexp(), A.entropy(), A.received(), A.mass({"two": [0, 3]}), A.at(targets),
            A.rows([2, 5]), A.pool(3, 2),
        )  # fmt: skip

    assert torch.autograd.gradcheck(outputs, (query, key, bias, V, W), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_through_a_soft_cap_and_to_sinks(causal: bool) -> None:
    def random(*shape: int) -> Tensor:
        return normal(*shape).double().requires_grad_()

    query, key, V, sinks, bias = (
        random(1, 4, 5, 3),
        random(1, 2, 6, 3),
        random(1, 2, 6, 2),
        random(4),
        random(1, 2, 1, 6),
    )

    def outputs(query: Tensor, key: Tensor, bias: Tensor, V: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        mask = None if causal else bias.repeat_interleave(2, dim=1)
        A = AttentionMap(query, key, mask, causal, enable_gqa=True, softcap=1.5, sinks=sinks, kernel="tiled")
        return A @ V, A.logsumexp(), A.entropy(), A.received(), A.mass({"two": [0, 3]}), A.rows([2, 4])

    assert torch.autograd.gradcheck(outputs, (query, key, bias, V, sinks))


def test_gradients_of_long_calls_are_those_of_the_reference() -> None:
    """Several strips of several pieces, which workers add up."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = random(1, 4, 600, 8), random(1, 2, 600, 8), random(1, 2, 600, 4), random(4)

    def gradients(softmax: Any) -> tuple[Tensor, ...]:
        output, received = softmax(*tensors)
        weights = torch.arange(600, dtype=torch.float64)
        return torch.autograd.grad((output**2).sum() + (received * weights).sum(), tensors)

    def by_kernel(query: Tensor, key: Tensor, V: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        A = AttentionMap(query, key, is_causal=True, enable_gqa=True, softcap=3.0, sinks=sinks)
        A.expect("received")
        return A @ V, A.received()

    def by_definition(query: Tensor, key: Tensor, V: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        matrix = Call(query, key, None, True, None, 3.0, sinks).matrix()
        return matrix @ V.repeat_interleave(2, dim=1), matrix.sum(2)

    for actual, expected in zip(gradients(by_kernel), gradients(by_definition), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_orderings_carry_no_gradient() -> None:
    q, k = torch.randn(2, 1, 2, 5, 8, requires_grad=True).unbind()
    A = AttentionMap(q, k)
    assert not any(t.requires_grad for t in (A.topk(2).shares, A.max(), A.mean_distance()))


def test_gradient_is_found_after_the_same_question_without() -> None:
    q, k = normal(1, 2, 5, 8).requires_grad_(), normal(1, 2, 5, 8)
    A = AttentionMap(q, k)
    with torch.no_grad():
        without = A.logsumexp()
    assert torch.equal(without, A.logsumexp())
    assert A.logsumexp().requires_grad


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(size: float, dtype: torch.dtype) -> None:
    query, key = normal(1, 2, 200, 16).to(dtype), normal(2, 1, 2, 200, 16)[1].to(dtype)
    bound = float((query.float() @ key.float().transpose(-1, -2)).abs().max()) / 4
    query = query * (size / bound)
    call = Call(query, key, None, False, None)
    assert float(call.logits().abs().max()) == pytest.approx(size, rel=0.05)
    A, matrix = AttentionMap(query, key), call.matrix()
    close(A.dense(), matrix)
    close(A.entropy(), call.entropy())
    exact = matrix.sum(2)
    assert bool(((A.received() - exact).abs() <= 1e-5 * exact.clamp(min=1e-30)).all())
    close(A.mass({"one": [3]})[..., 0], matrix[..., 3])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_hot_rows(kernel: Any) -> None:
    query = 100.0 * torch.eye(32)[None, None]
    A = AttentionMap(query, torch.eye(32)[None, None], scale=1.0, kernel=kernel)
    assert torch.equal(A.received(), torch.ones(1, 1, 32))
    assert bool((A.entropy() < 1e-12).all())
    assert torch.equal(A.topk(1).keys[0, 0, :, 0], torch.arange(32))


def test_long_context_keeps_its_accuracy() -> None:
    """N = 16,384, checked on a sample of rows and columns against the definition."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 16384, 64, generator=generator) for _ in range(2))
    A = AttentionMap(query, key, is_causal=True)
    A.expect("entropy")
    A.expect("received")
    A.expect("mass", segments := {"sink": [0], "late": slice(9000, 16000)})
    entropy, received, mass = A.entropy(), A.received(), A.mass(segments)
    rows = torch.tensor([0, 1, 777, 9001, 16383])
    logits = (query.double()[:, :, rows] @ key.double().transpose(-1, -2) / 8).masked_fill(
        torch.arange(16384) > rows[:, None], -math.inf
    )
    matrix = logits.softmax(-1)
    close(entropy[:, :, rows], torch.special.entr(matrix).sum(-1))
    close(mass[:, :, rows], torch.stack([matrix[..., 0], matrix[..., 9000:16000].sum(-1)], -1))
    columns, exact = [0, 5000, 16383], torch.zeros(1, 1, 3, dtype=torch.float64)
    for start in range(0, 16384, 1024):
        part = torch.arange(start, start + 1024)
        logits = query.double()[:, :, part] @ key.double().transpose(-1, -2) / 8
        exact += logits.masked_fill(torch.arange(16384) > part[:, None], -math.inf).softmax(-1)[..., columns].sum(2)
    assert bool(((received[..., columns] - exact).abs() <= 1e-5 * exact).all())


def test_rows_that_see_nothing() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    for kernel in KERNELS:
        A = AttentionMap(normal(1, 2, 6, 8), normal(1, 2, 6, 8), mask, kernel=kernel)
        assert not A.dense()[:, :, 2].any()
        assert not (A @ normal(1, 2, 6, 4))[:, :, 2].any()
        assert bool(A.logsumexp()[:, :, 2].isneginf().all())
        assert not A.entropy()[:, :, 2].any()
        assert not A.at(torch.zeros(6, dtype=torch.long))[:, :, 2].any()
        close(A.received().sum(-1), torch.full((1, 2), 5.0))


def test_memory_does_not_grow_with_the_square() -> None:
    """A matrix of 32,768² would take 4 GiB a head; the strips' buffers stay below 64 MB."""
    query = torch.randn(1, 1, 32768, 8)
    scores = AttentionMap(query, query, is_causal=True)._scores
    strips = [strip for piece in _tiled.pieces(scores) for strip in _tiled.strips(scores, piece)]
    assert max(math.prod(strip.shape) for strip in strips) * 4 <= 64 * 2**20
    covered = sum((strip.rows.stop - strip.rows.start) for strip in strips)
    assert covered == 32768


def test_fused_operator_that_refuses_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(_fused, "_attend_cpu", refuse)
    q, k, v = normal(3, 1, 2, 9, 8).unbind()
    A = AttentionMap(q, k, kernel="fused")
    close(A @ v, AttentionMap(q, k, kernel="dense") @ v)


def test_one_pass_answers_all_that_was_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(_pass, "evaluate", lambda *a: passes.append(a) or _select.evaluate(*a))
    q, k, v = normal(3, 1, 2, 9, 8).unbind()
    A, segments = AttentionMap(q, k), {"a": [0]}
    for question in (("entropy",), ("received",), ("mass", segments), ("product", v)):
        A.expect(*question)
    answers = A.entropy(), A.received(), A.mass(segments), A @ v
    assert len(passes) == 1
    alone = AttentionMap(q, k)
    for answer, again in zip(
        answers, (alone.entropy(), alone.received(), alone.mass(segments), alone @ v), strict=True
    ):
        close(answer, again)
    assert len(passes) == 5


def test_heads_are_chosen() -> None:
    q, k = normal(2, 6, 9, 8), normal(2, 3, 9, 8)
    mask = normal(2, 6, 9, 9)
    A = AttentionMap(q, k, mask, enable_gqa=True)
    close(A.heads([5, 0]).dense(), A.dense()[:, [5, 0]])


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    arguments = {"query": normal(2, 4, 5, 8), "key": normal(2, 4, 7, 8)} | changes
    with pytest.raises(error, match=message):
        AttentionMap(**arguments)


def test_inputs_that_are_refused() -> None:
    refused(
        ValueError, r"query must be \(batch, heads, tokens, head_dim\), got shape \(4, 5, 8\)", query=normal(4, 5, 8)
    )
    refused(ValueError, r"key has no heads or no head_dim: shape \(2, 4, 7, 0\)", key=normal(2, 4, 7, 0))
    refused(ValueError, r"query has no heads or no head_dim: shape \(2, 0, 5, 8\)", query=normal(2, 0, 5, 8))
    refused(ValueError, "differ in head_dim: 8 and 6", key=normal(2, 4, 7, 6))
    refused(ValueError, "query has batch 2 and key 3", key=normal(3, 4, 7, 8))
    refused(ValueError, "query has 4 heads and key 2; pass enable_gqa=True", key=normal(2, 2, 7, 8))
    refused(ValueError, "divisible by key heads, got 4 and 3", key=normal(2, 3, 7, 8), enable_gqa=True)
    refused(TypeError, "dtype torch.int64", query=torch.ones(2, 4, 5, 8, dtype=torch.long))
    refused(TypeError, "query must be a torch.Tensor, got ndarray", query=normal(2, 4, 5, 8).numpy())
    refused(TypeError, "share a dtype, got torch.float64 and torch.float32", query=normal(2, 4, 5, 8).double())
    refused(ValueError, r"attn_mask of shape \(3, 7\) does not broadcast to \(2, 4, 5, 7\)", attn_mask=normal(3, 7))
    refused(TypeError, "boolean .* or floating point", attn_mask=torch.ones(5, 7, dtype=torch.long))
    refused(ValueError, "exclude each other", attn_mask=normal(5, 7), is_causal=True)
    refused(ValueError, "kernel must be one of auto, dense, tiled, fused, blocked, got 'flash'", kernel="flash")
    for softcap in (0.0, -2.0, math.inf, math.nan):
        refused(ValueError, "softcap must be a positive number", softcap=softcap)
    refused(ValueError, r"one logit for each head \(4,\), .* got shape \(5,\)", sinks=normal(5))
    refused(ValueError, r"got shape \(2, 4, 5, 7\)", sinks=normal(2, 4, 5, 7))
    refused(TypeError, "sinks must be logits, of a floating point dtype, got torch.int64", sinks=torch.ones(4).long())
    refused(ValueError, "sinks hold NaN or \\+infinity", sinks=torch.full((4,), math.inf))
    refused(
        ValueError,
        "key holds an infinity: 1 entries",
        key=normal(2, 4, 7, 8).index_put((torch.tensor(0),) * 4, torch.tensor(math.inf)),
    )
    refused(TypeError, "nested tensor", query=torch.nested.nested_tensor([normal(4, 5, 8)], layout=torch.jagged))


def test_questions_that_are_refused() -> None:
    A = AttentionMap(normal(2, 4, 5, 8), normal(2, 2, 7, 8), enable_gqa=True)
    for error, message, ask in (
        (
            ValueError,
            r"V of shape \(2 or 1, 2 or 4 or 1, 7, width\), got \(2, 4, 5, 8\)",
            lambda: A @ normal(2, 4, 5, 8),
        ),
        (ValueError, r"V of shape \(2 or 1, 4 or 1, 5, width\), got \(2, 4, 7, 8\)", lambda: A.T @ normal(2, 4, 7, 8)),
        (ValueError, r"weights of shape \(2 or 1, 4 or 1, 5\), got \(2, 4, 7\)", lambda: A.received(normal(2, 4, 7))),
        (IndexError, "segment 'image' ends at 9, but there are 7 keys", lambda: A.mass({"image": slice(1, 9)})),
        (IndexError, "segment 'sink' names position 7, but there are 7 keys", lambda: A.mass({"sink": [0, 7]})),
        (ValueError, "segment 'none' is empty", lambda: A.mass({"none": []})),
        (ValueError, "mapping from names to keys", lambda: A.mass([0])),  # type: ignore[arg-type]
        (IndexError, "targets go from 0 to 8; keys from 0 to 6", lambda: A.at(torch.tensor([0, 8, 1, 1, 1]))),
        (ValueError, r"positions of shape \(5,\) or \(2, 5\)", lambda: A.at(torch.zeros(4, dtype=torch.long))),
        (IndexError, "rows names position 5, but there are 5 queries", lambda: A.rows([5])),
        (ValueError, r"topk\(8\) of 7 keys", lambda: A.topk(8)),
        (ValueError, r"pool\(6, 2\) of a 5×7 matrix", lambda: A.pool(6, 2)),
        (IndexError, "heads names position 4, but there are 4 heads", lambda: A.heads([4])),
        (ValueError, "expect.* knows entropy, received, mass, product; got 'mean'", lambda: A.expect("mean")),
    ):
        with pytest.raises(error, match=message):
            ask()


def test_a_large_matrix_is_only_made_on_request() -> None:
    A = AttentionMap(torch.zeros(1, 2, 20000, 1), torch.zeros(1, 2, 20000, 1))
    with pytest.raises(ValueError, match=r"\(1, 2, 20000, 20000\) takes 3.0 GiB.*force=True"):
        A.dense()


@pytest.mark.parametrize("keys", [4, 6])
def test_tiles_are_in_the_order_asked_for(keys: int) -> None:
    A = AttentionMap(normal(1, 2, 5, 8), normal(1, 2, keys, 8))
    order = [3, 2, 1, 0]
    for rows in ([0], [4, 2, 0], slice(None)):
        assert torch.allclose(A.tile(rows, order), A.dense()[:, :, rows][..., order], atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("causal", [True, False])
def test_scales_that_are_not_positive(kernel: Any, scale: float, causal: bool) -> None:
    query, key, value = normal(3, 1, 2, 9, 8).unbind()
    call = Call(query, key, None, causal, scale)
    A, matrix = AttentionMap(**call.arguments(), kernel=kernel), call.matrix()
    close(A @ value, matrix @ value.double())
    close(A.received(), matrix.sum(2))
    close(A.entropy(), call.entropy())
    close(A.logsumexp(), call.logsumexp())


@pytest.mark.parametrize("masked", ["causal", "boolean", "additive", "blind"])
def test_gradients_of_the_reference_kernel(masked: str) -> None:
    """Entries of 0 and rows that see nothing have gradients of 0, not NaN."""
    query, key = normal(1, 2, 5, 8).double().requires_grad_(), normal(1, 2, 6, 8).double().requires_grad_()
    mask = normal(1, 1, 5, 6).double()
    if masked == "boolean":
        mask = mask > 0
    elif masked == "additive":
        mask = mask.masked_fill(mask > 0.5, -math.inf)
    elif masked == "blind":
        mask = mask > 0
        mask[:, :, 2] = False

    def outputs(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        A = AttentionMap(query, key, None if masked == "causal" else mask, masked == "causal", kernel="dense")
        seen = A.logsumexp()
        return A.entropy(), seen.masked_fill(seen.isneginf(), 0.0), A.received(), A.dense()

    assert torch.autograd.gradcheck(outputs, (query, key), fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_with_more_batch_or_heads_than_the_map(kernel: Any) -> None:
    for shape in ((1, 1), (1, 3), (2, 1)):
        call = Call(normal(*shape, 5, 8), normal(*shape, 7, 8), None, True, None)
        A, value = AttentionMap(**call.arguments(), kernel=kernel), normal(2, 3, 7, 4)
        close(A @ value, call.matrix() @ value.double())
        A.expect("product", value)
        close(A @ value, call.matrix() @ value.double())
        weights = normal(2, 3, 5, 4)
        close(A.T @ weights, call.matrix().mT @ weights.double())
    with pytest.raises(ValueError, match=r"V of shape \(any batch, 3 or 1, 7, width\), got \(2, 2, 7, 4\)"):
        AttentionMap(normal(1, 3, 5, 8), normal(1, 3, 7, 8)) @ normal(2, 2, 7, 4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 2, 0, 0)])
def test_no_batch_no_queries_no_keys(kernel: Any, shape: tuple[int, ...]) -> None:
    batch, heads, queries, keys = shape
    A = AttentionMap(normal(batch, heads, queries, 8), normal(batch, heads, keys, 8), kernel=kernel)
    assert A.shape == shape
    assert torch.equal(A @ normal(batch, heads, keys, 5), torch.zeros(batch, heads, queries, 5))
    assert torch.equal(A.T @ normal(batch, heads, queries, 5), torch.zeros(batch, heads, keys, 5))
    assert torch.equal(A.received(), torch.zeros(batch, heads, keys))
    assert torch.equal(A.entropy(), torch.zeros(batch, heads, queries))
    assert A.logsumexp().shape == (batch, heads, queries)
    assert bool(A.logsumexp().isneginf().all())
    assert A.dense().shape == shape
    assert A.at(torch.full((queries,), -1)).shape == (batch, heads, queries)
    assert A.mean_distance().shape == (batch, heads, queries)
    if keys:
        assert A.topk(2).keys.shape == (batch, heads, queries, 2)
    assert (A + A.scale_rows(torch.ones(queries))).received().shape == (batch, heads, keys)


def test_viewers_take_no_square() -> None:
    """A mask of keys alone was expanded to every query."""
    tokens = 200_000
    mask = torch.arange(tokens).expand(2, 1, 1, tokens) % 3 > 0
    A = AttentionMap(torch.zeros(2, 1, tokens, 1), torch.zeros(2, 1, tokens, 1), mask)
    assert torch.equal(A.viewers(), mask[:, :, 0] * float(tokens))
    each = normal(4, 2, 9, 6) > 0
    weights = normal(1, 1, 9)
    found = AttentionMap(normal(4, 2, 9, 8), normal(4, 2, 6, 8), each).viewers(weights)
    close(found, (each * weights[..., None]).sum(2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_heads_that_are_not_contiguous(kernel: Any) -> None:
    query, key = normal(1, 2, 64, 48).mT, normal(2, 1, 2, 64, 48)[1].mT
    value = normal(1, 2, 64, 48).mT
    call = Call(query, key, None, False, None)
    close(AttentionMap(query, key, kernel=kernel) @ value, call.matrix() @ value.double())


def test_columns_beside_queries_and_keys() -> None:
    """Two columns: a bias of each key, and one that hides a key from a query that then sees nothing else."""
    query, key, bias = normal(1, 2, 5, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 1)
    blind = torch.zeros(1, 2, 5, dtype=torch.bool)
    blind[:, :, 3] = True
    wide = torch.cat([query, query.new_ones(1, 2, 5, 1)], -1), torch.cat([key, bias], -1)
    logits = query.double() @ key.double().mT + bias.double().mT
    for mask in (None, normal(1, 1, 5, 6) > -1, normal(1, 1, 5, 6)):
        A = AttentionMap(query, key, mask).with_columns(*wide, scale=1.0, added=3.0, blind=blind)
        terms = (
            logits
            if mask is None
            else logits.masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else logits + mask
        )
        close(A.dense(), terms.softmax(-1).masked_fill(blind[..., None], 0.0))


def test_soft_cap_of_gemma_2() -> None:
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v = (normal(3, 2, 6, 40, 16)[i].double() for i in range(3))
    k, v, triangle = k[:, :2], v[:, :2], torch.full((40, 40), -math.inf, dtype=torch.float64).triu(1)[None, None]
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    output, matrix = modeling.eager_attention_forward(module, 5 * q, k, v, triangle, scaling=0.3, softcap=4.0)
    A = AttentionMap(5 * q, k, is_causal=True, scale=0.3, enable_gqa=True, softcap=4.0)
    close(A @ v, output.transpose(1, 2), 1e-6)  # its softmax is in float32
    close(A.dense(), matrix, 1e-6)  # its softmax is in float32


def test_sinks_of_gpt_oss() -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = (normal(3, 2, 6, 40, 16)[i].double() for i in range(3))
    k, v, triangle = k[:, :2], v[:, :2], torch.full((40, 40), -math.inf, dtype=torch.float64).triu(1)[None, None]
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    module.sinks = torch.nn.Parameter(normal(6).double())
    output, matrix = modeling.eager_attention_forward(module, q, k, v, triangle, scaling=0.3)
    A = AttentionMap(q, k, is_causal=True, scale=0.3, enable_gqa=True, sinks=module.sinks.detach())
    close(A @ v, output.transpose(1, 2), 1e-12)
    close(A.rows([0, 7, 39]), matrix[:, :, [0, 7, 39]], 1e-12)
    close(A.entropy(), torch.special.entr(matrix).sum(-1), 1e-12)
    close(A.received(), matrix.sum(2), 1e-12)
    best = A.topk(3)
    close(best.shares, matrix.topk(3).values, 1e-12)


def test_sinks_beside_rows_that_see_nothing_and_without_effect() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    q, k, v = normal(3, 1, 2, 6, 8).unbind()
    for kernel in KERNELS:
        A = AttentionMap(q, k, mask, sinks=torch.tensor([1.0, -math.inf]), kernel=kernel)
        assert not (A @ v)[:, :, 2].any()
        assert A.logsumexp()[0, :, 2].tolist() == pytest.approx([1.0, -math.inf])
        assert not A.entropy()[:, :, 2].any()
        close((A @ v)[:, 1], (AttentionMap(q, k, mask) @ v)[:, 1])


def test_threads_change_nothing_but_rounding() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 6, 1024, 16, generator=generator) for _ in range(3))
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            A = AttentionMap(q, k[:, :2], is_causal=True, enable_gqa=True)
            segments, values = {"first": [0]}, v[:, :2]
            for question in (("entropy",), ("received",), ("mass", segments), ("product", values)):
                A.expect(*question)
            answers.append((A.entropy(), A.received(), A.mass(segments), A @ values))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*answers, strict=True):
        close(one, two, 1e-6)
        assert torch.equal(two, again)
