"""Products of scores, budgets, times and rests: what is kept, and what calls then attend to."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    Budget,
    BudgetPolicy,
    ByLayer,
    ChunkKV,
    CriticalKV,
    Drop,
    Every,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    Merge,
    ObservedAttention,
    Policy,
    Pyramid,
    QFilters,
    Random,
    Rest,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
    Unread,
    When,
)
from regard.runtime import Proceed, Site, entered
from tests.cache.conftest import decoder, texts

LLAMA = decoder("llama")
PROMPT, STEPS = 18, 4
FILTERS = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
Make = Callable[..., Policy]

SCORES: dict[str, Make] = {
    "Knorm": Knorm,
    "KeyDiff": KeyDiff,
    "Random": Random,
    "StreamingLLM": lambda **slots: StreamingLLM(**slots, sinks=1),
    "TOVA": TOVA,
    "SnapKV": lambda **slots: SnapKV(**slots, window=2, kernel=3),
    "SnapKV, max": lambda **slots: SnapKV(**slots, window=2, kernel=3, pooling="max"),
    "ObservedAttention": ObservedAttention,
    "ExpectedAttention": lambda **slots: ExpectedAttention(**slots, sinks=1, future=8),
    "QFilters": lambda **slots: QFilters(**slots, filters=FILTERS),
    "RetrievalHeads": lambda **slots: RetrievalHeads(**slots, sinks=1, heads={1: [0]}),
    "TaskKV": lambda **slots: TaskKV(**slots, sinks=1, recent=2, window=2, kernel=3, heterogeneous=(0.5, 0.0)),
    "ChunkKV": lambda **slots: ChunkKV(Knorm(**slots), length=2),
    "CriticalKV": lambda **slots: CriticalKV(SnapKV(**slots, window=2, kernel=3)),
}
BUDGETS: tuple[int | float | Budget, ...] = (
    7, ByLayer(0.4, [0.8, 1.0, 1.2]), Adaptive(7), Adaptive(Pyramid(0.5, beta=2), floor=0.5, safeguard=0.3)
)  # fmt: skip
WHENS: tuple[When, ...] = (AfterPrompt(), Every(1), Every(2, prompt=False))
RESTS: tuple[Rest, ...] = (Drop(), Merge(neighbours=3), Unread())


class Run:
    """A prompt and steps after it, of two texts, one padded: logits, what was kept before each step, and its calls."""

    edits = outermost = False

    def __init__(self, policy: Policy, noted: bool) -> None:
        inputs = texts(PROMPT, PROMPT - 7)
        written = torch.randint(3, 97, (2, STEPS), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([inputs["input_ids"], written], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(written)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        self.calls: list[list[regard.AttentionCall]] = [[] for _ in range(3)]
        self.kept: list[list[Tensor]] = []
        logits = []
        beside = entered(self, LLAMA) if noted else nullcontext()
        with torch.no_grad(), regard.compress(LLAMA, policy) as cache, beside:
            past = None
            for end in range(PROMPT, PROMPT + STEPS + 1):
                start = 0 if past is None else end - 1
                output = LLAMA(ids[:, start:end], attention_mask=mask[:, :end], position_ids=places[:, start:end],
                               past_key_values=past)  # fmt: skip
                past = output.past_key_values
                logits.append(output.logits[:, -1])
                self.kept.append([layer.positions for layer in cache.report().layers])
        self.logits, self.past, self.report = torch.stack(logits, 1), past, cache.report()

    def wants(self, site: Site) -> bool:
        return True

    def intercept(self, call: regard.AttentionCall, proceed: Proceed, alone: bool) -> Tensor:
        self.calls[call.place.layer].append(call)
        return proceed(call)


def of_key_heads(tensor: Tensor) -> Tensor:
    """Keys or values as the cache has them, where the model repeats them for its query heads."""
    return tensor[:, :: tensor.shape[1] // 2]


def budget_of(layer: int, budget: int | float | Budget, tokens: Tensor) -> Tensor:
    """Entries of each head in the mean, of texts of so many tokens, by hand."""
    match budget:
        case Adaptive():
            return budget_of(layer, budget.budget, tokens)
        case Pyramid():
            return torch.empty(0)  # held in test_policies.py
        case ByLayer():
            return (budget_of(layer, budget.budget, tokens) * budget.factors[layer] - 1e-6).ceil()
        case float():
            return (tokens * budget - 1e-6).ceil()
    return torch.full_like(tokens, budget)


def cases() -> Iterator[Any]:
    """Every score, budget and rest together, with times in turn."""
    for number, (score, budget, rest) in enumerate(product(SCORES, BUDGETS, RESTS)):
        when = WHENS[(number + number // len(RESTS)) % len(WHENS)]
        yield pytest.param(score, budget, when, rest, id=f"{score}, {budget}, {when}, {rest}")


@pytest.mark.parametrize(("score", "budget", "when", "rest"), list(cases()))
def test_products(score: str, budget: Any, when: When, rest: Rest) -> None:
    """Each call attends to what was kept before it and to its own token; what is kept holds the budget."""
    policy = SCORES[score](budget=budget, when=when, rest=rest)
    plain, noted = Run(policy, noted=False), Run(policy, noted=True)
    torch.testing.assert_close(plain.logits, noted.logits, atol=1e-4, rtol=1e-3)
    for layer, (prompt, *steps) in enumerate(noted.calls):
        key, value = (of_key_heads(tensor) for tensor in (prompt.key, prompt.value))
        for step, call in enumerate(steps):
            read_key, read_value = of_key_heads(call.key), of_key_heads(call.value)
            key = torch.cat([key, read_key[:, :, -1:]], 2)
            value = torch.cat([value, read_value[:, :, -1:]], 2)
            left = torch.cat([noted.kept[step][layer], torch.ones(2, 2, 1, dtype=torch.bool)], 2)
            visible = left.repeat_interleave(2, 1)[:, :, None]
            found = call.attn_mask if call.attn_mask is not None else torch.ones_like(visible)
            found = found.expand(-1, 4, -1, -1)
            real = torch.ones(2, 1, 1, PROMPT + step + 1, dtype=torch.bool)
            real[1, ..., :7] = False
            torch.testing.assert_close(found & real, visible & real)
            torch.testing.assert_close(read_key[left], key[left])
            if not isinstance(rest, Merge):
                torch.testing.assert_close(read_value[left], value[left])
        if not isinstance(policy, BudgetPolicy) or score in ("RetrievalHeads", "TaskKV"):
            continue
        for step, kept in enumerate(noted.kept):
            tokens = torch.tensor([PROMPT, PROMPT - 7]) + step
            expected = budget_of(layer, budget, tokens)
            if not expected.numel() or not when.due(PROMPT if step == 0 else 1, step):
                continue
            there = 2 * tokens if not step or isinstance(rest, Unread) else noted.kept[step - 1][layer].sum((1, 2)) + 2
            assert torch.equal(kept[layer].sum((1, 2)), (2 * expected).long().minimum(there)), step


@pytest.mark.parametrize(("score", "rest"), list(product(SCORES, RESTS)), ids=str)
def test_beams_follow(score: str, rest: Rest) -> None:
    """Generation with beams, padded: twice the same, and as long as asked for."""
    policy = SCORES[score](budget=Adaptive(0.5), when=Every(2), rest=rest)
    written = []
    for _ in range(2):
        with regard.compress(LLAMA, policy):
            written.append(LLAMA.generate(**texts(16, 11), max_new_tokens=5, do_sample=False, num_beams=2))
    assert torch.equal(*written)
    assert written[0].shape == (2, 21)
