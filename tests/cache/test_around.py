"""ChunkKV and CriticalKV by hand, and the scores that need more than keys: ExpectedAttention, KeyDiff, Q-Filters."""

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import (
    Adaptive,
    BudgetPolicy,
    ChunkKV,
    CriticalKV,
    Entries,
    Every,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    Policy,
    QFilters,
    SnapKV,
)
from tests.cache.conftest import decoder, texts

LLAMA = decoder("llama")
FILTERS = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
POLICIES: tuple[Policy, ...] = (
    ExpectedAttention(budget=10, sinks=2), KeyDiff(budget=10), QFilters(budget=10, filters=FILTERS),
    ChunkKV(SnapKV(budget=13, window=3), length=4), CriticalKV(SnapKV(budget=Adaptive(10), window=3)),
    ChunkKV(CriticalKV(Knorm(budget=0.4)), length=3),
)  # fmt: skip


def kept_after_prompt(policy: Policy, inputs: dict[str, Tensor]) -> list[Tensor]:
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        LLAMA(**inputs, position_ids=places)
    return [layer.positions for layer in cache.report().layers]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_padded_text_is_compressed_as_alone(policy: Policy, side: str) -> None:
    inputs = texts(40, 30)
    if side == "right":
        inputs = {name: torch.stack([values[0], values[1].roll(-10)]) for name, values in inputs.items()}
    own = slice(10, 40) if side == "left" else slice(0, 30)
    together = kept_after_prompt(policy, inputs)
    alone = kept_after_prompt(policy, {name: values[1:, own] for name, values in inputs.items()})
    for both, single in zip(together, alone, strict=True):
        assert torch.equal(both[1, :, own], single[0])
        assert both[1].sum() == single.sum()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_they_decode_with_beams(policy: Any) -> None:
    """And a policy that compresses at steps too holds its budget there."""
    inputs = texts(24, 18)
    with regard.compress(LLAMA, policy) as cache:
        LLAMA.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    assert cache.report().kept < 0.75
    within = getattr(policy, "policy", policy)
    if isinstance(within, BudgetPolicy) and within is policy:
        steps = type(policy)(**{**vars(policy), "when": Every(2)})
        with regard.compress(LLAMA, steps) as cache:
            LLAMA.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert all(max(layer.kept) <= 11 for layer in cache.report().layers)


class Given(BudgetPolicy):
    """Scores of two heads of twelve entries; the last is kept in any case."""

    def score(self, entries: Entries) -> Tensor:
        first = [0, 0, 9, 0, 1, 1, 5, 5, 5, 2, 2, math.inf]
        second = [3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 8, math.inf]
        return torch.tensor([[first, second]], dtype=torch.float32)


def test_chunks_by_hand() -> None:
    """Means of both heads by chunks of 3: 3 + 3, 2/3 + 0, 5 + 0, 2 + 4 (of its two entries that are not kept anyway)."""
    inputs = texts(12)
    for budget, expected in ((4, [0, 1, 2, 11]), (6, [0, 1, 2, 11]), (7, [0, 1, 2, 9, 10, 11]),
                             (10, [0, 1, 2, 6, 7, 8, 9, 10, 11]), (12, [*range(12)])):  # fmt: skip
        kept = kept_after_prompt(ChunkKV(Given(budget=budget), length=3), inputs)
        assert [head.nonzero()[:, 0].tolist() for head in kept[0][0]] == [expected] * 2, budget
    nothing = kept_after_prompt(ChunkKV(Knorm(budget=2), length=5), inputs)
    assert all(layer[0, 0].sum() in (2, 5) for layer in nothing)  # a chunk at least


def test_critical_by_hand() -> None:
    """The best two by score, then by score times what the value adds to the output."""
    inputs, found = texts(12), []

    class Noting(Given):
        def score(self, entries: Entries) -> Tensor:
            weight = entries.module_call.output_weight.double()
            values = entries.values[0].double().repeat_interleave(2, 0)
            norms = torch.stack([(own @ part).abs().sum(-1) for own, part in zip(values, weight, strict=True)])
            found.append(norms.unflatten(0, (2, 2)).mean(1))
            return super().score(entries)

    (kept, *_) = kept_after_prompt(CriticalKV(Noting(budget=5), first=0.4, epsilon=0.5), inputs)
    scores = Given(budget=5).score(None)[0].double()  # type: ignore[arg-type]
    for head in (0, 1):
        best = set(scores[head].argsort(descending=True, stable=True)[:2].tolist())
        rest = sorted(
            set(range(12)) - best, key=lambda place: -float((scores[head, place] + 0.5) * found[0][head, place])
        )
        assert kept[0, head].nonzero()[:, 0].tolist() == sorted([*best, *rest[:3]])


def test_filters_are_the_authors() -> None:
    """Of the queries of every head: the first right-singular vector, turned away from most of them, the mean of a group."""
    sample, queries = texts(30)["input_ids"], list[Tensor]()

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        queries.append(call.query[0].double())
        return call

    with torch.no_grad(), regard.steer(LLAMA, regard.Custom(note)):
        LLAMA(sample)
    filters = QFilters.calibrate(LLAMA, [sample[0]])
    assert filters.shape == (3, 2, 8)
    for layer, query in enumerate(queries):
        for head in range(2):
            expected = torch.zeros(8, dtype=torch.float64)
            for own in query[2 * head : 2 * head + 2]:
                direction = torch.linalg.eigh(own.T @ own).eigenvectors[:, -1]
                direction = direction if (own @ direction > 0).double().mean() > 0.5 else -direction
                expected -= direction / 2
            torch.testing.assert_close(filters[layer, head].double(), expected, atol=1e-4, rtol=1e-3)


def test_expected_attention_is_what_such_queries_attend_to_in_the_mean() -> None:
    """E[exp(scale q·k)] over queries drawn from the distribution, on few keys, in place of the formula."""
    sample = texts(24)["input_ids"]
    policy, found = ExpectedAttention(budget=8, sinks=0, future=1, values=False), list[Any]()

    class Noting(ExpectedAttention):
        def score(self, entries: Entries) -> Tensor:
            mean, covariance = self._distribution(entries.module_call, entries.tokens)
            found.append((mean, covariance, entries.keys, entries.module_call.call.factor, super().score(entries)))
            return found[-1][-1]

    small = decoder("llama")
    with torch.no_grad():
        for layer in small.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.1)
    with torch.no_grad(), regard.compress(small, Noting(**vars(policy))):
        small(sample)
    for mean, covariance, keys, factor, scores in found:
        root = torch.linalg.cholesky(covariance[0].double() + 1e-9 * torch.eye(8))
        noise = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for head in range(2):
            each = []
            for query in (2 * head, 2 * head + 1):
                drawn = mean[0, query].double() + noise @ root[query].T
                weights = (factor * drawn @ keys[0, head].double().T).exp().mean(0)
                each.append(weights / weights.sum())
            torch.testing.assert_close(torch.stack(each).mean(0), scores[0, head].double(), atol=2e-3, rtol=3e-2)


def test_keydiff_by_hand() -> None:
    kept, keys = kept_after_prompt(KeyDiff(budget=5), texts(16)), list[Tensor]()

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        keys.append(call.key[0].double())
        return call

    with torch.no_grad(), regard.steer(LLAMA, regard.Custom(note)):
        LLAMA(**texts(16))
    for layer, own in enumerate(keys):
        for head in range(2):
            unit = own[head * (own.shape[0] // 2)]
            unit = unit / unit.norm(dim=-1, keepdim=True)
            like = unit @ unit.mean(0)
            assert kept[layer][0, head].nonzero()[:, 0].tolist() == sorted(like.argsort()[:5].tolist())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ChunkKV(regard.cache.KeepAll()), TypeError, r"ChunkKV goes around a policy with a budget"),
        (lambda: ChunkKV(Knorm(budget=3), length=0), ValueError, r"length must be at least 1 token, got 0"),
        (lambda: CriticalKV(Knorm(budget=3), first=2), ValueError, r"first must be a share from 0 to 1, got 2"),
        (lambda: CriticalKV(Knorm(budget=3), epsilon=-1), ValueError, r"epsilon must not be negative"),
        (lambda: ExpectedAttention(budget=0.5, future=0), ValueError, r"future must be at least 1, got 0"),
        (lambda: QFilters(budget=0.5, filters=FILTERS[0]), ValueError, r"\(layers, key heads, width\).*got \(2, 8\)"),
        (lambda: QFilters(budget=0.5, filters="mine"), ValueError, r"got str"),
        (lambda: kept_after_prompt(QFilters(budget=0.5, filters=FILTERS[:2]), texts(12)), ValueError,
         r"filters are \(2, 2, 8\), but the model has \(3, 2, 8\)"),
        (lambda: QFilters.calibrate(LLAMA, []), ValueError, r"texts of two tokens at least"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_output_projection_of_another_name() -> None:
    model = hf.LlamaForCausalLM(LLAMA.config).eval()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.last = attention.o_proj
        object.__setattr__(attention, "forward", attention.forward)
        del attention._modules["o_proj"]
        attention.o_proj = torch.nn.Sequential(attention.last)
    with pytest.raises(ValueError, match=r"no output projection by one of the names"), torch.no_grad(), \
            regard.compress(model, CriticalKV(Knorm(budget=5))):  # fmt: skip
        model(**texts(12))
