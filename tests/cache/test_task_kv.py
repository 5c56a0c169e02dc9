"""Which heads are heterogeneous, and what each head keeps, held to the rule on the stored matrix in float64."""

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import avg_pool1d

import regard
from regard.cache import AfterPrompt, ByLayer, Every, TaskKV, When
from tests.cache.conftest import GROUPED, texts
from tests.cache.reference import matrix, of_key_heads

KEY_HEADS, LAYERS = 4, 3
SMALL: dict[str, Any] = {"sinks": 2, "recent": 4, "window": 5, "kernel": 3, "strongest": 6}


@pytest.fixture(scope="module")
def model() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = GROUPED | {"num_attention_heads": 8, "num_key_value_heads": KEY_HEADS, "hidden_size": 64}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def layers_of(model: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of each layer's call."""
    found = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        repeats = call.key.shape[1] // KEY_HEADS
        found.append((call.query, call.key[:, ::repeats], call.value[:, ::repeats]))
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        model(**inputs)
    return found


def kept_after_prompt(model: hf.PreTrainedModel, policy: TaskKV, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), regard.compress(model, policy) as cache:
        model(**inputs)
    return [layer.positions & inputs["attention_mask"].bool()[:, None] for layer in cache.report().layers]


def expected(
    policy: TaskKV, received: Tensor, values: Tensor, first: int, number: int
) -> tuple[set[int], list[list[int]]]:
    """The heterogeneous heads of one text, and the positions that each head keeps, in plain Python."""
    tokens = received.shape[1] - first
    vectors = []
    for head in range(KEY_HEADS):
        strongest = sorted(range(first, first + tokens), key=lambda j: -float(received[head, j]))[: policy.strongest]
        mean_attention = received / min(policy.window, tokens)
        vectors.append(sum(mean_attention[head, j] * values[head, j].double() for j in strongest))
    center = sum(vectors) / KEY_HEADS
    ranking = sorted(range(KEY_HEADS), key=lambda head: -float((vectors[head] - center).norm()))
    full = set(ranking[:number]) if number < 2 else {*ranking[: number - 1], ranking[-1]}

    budget = math.ceil(tokens * policy.budget - 1e-9)
    rest = (KEY_HEADS * budget - number * tokens) // max(KEY_HEADS - number, 1)
    kept = []
    for head in range(KEY_HEADS):
        sure = set(range(first, first + policy.sinks)) | set(range(first + tokens - policy.recent, first + tokens))
        middle = received[head].clone()
        middle[sorted(sure)] = 0
        pooled = avg_pool1d(middle[None], policy.kernel, stride=1, padding=policy.kernel // 2)[0]
        others = sorted(set(range(first, first + tokens)) - sure, key=lambda j: -float(pooled[j]))
        chosen = sure | set(others[: rest - len(sure)])
        kept.append(list(range(first, first + tokens)) if head in full else sorted(chosen))
    return full, kept


@pytest.mark.parametrize("lengths", [(40,), (40, 27, 33)], ids=["one", "padded"])
@pytest.mark.parametrize(
    ("shares", "budget", "numbers"),
    [
        ((0.75, 0.25), 0.85, [3, 2, 1]),
        ((0.5, 0.0), 0.6, [2, 1, 0]),
        ((0.25, 0.125), 0.5, [1, 1, 1]),  # 1, 0.75 and 0.5 heads, to the nearest number
        ((1.0, 1.0), 1.0, [4, 4, 4]),
    ],
)
def test_heterogeneous_heads_keep_all_and_the_others_what_is_left(
    model: hf.PreTrainedModel,
    lengths: tuple[int, ...],
    shares: tuple[float, float],
    budget: float,
    numbers: list[int],
) -> None:
    inputs = texts(*lengths)
    real = inputs["attention_mask"].bool()
    policy = TaskKV(budget=budget, heterogeneous=shares, **SMALL)
    kept = kept_after_prompt(model, policy, inputs)
    for layer, (query, key, value) in enumerate(layers_of(model, inputs)):
        weights = matrix(query[:, :, -policy.window :], key, real)
        received = of_key_heads(weights.sum(2), KEY_HEADS)
        for row, length in enumerate(lengths):
            full, positions = expected(policy, received[row], value[row], 40 - length, numbers[layer])
            found = [head.nonzero()[:, 0].tolist() for head in kept[layer][row]]
            assert found == positions, (layer, row)
            assert {head for head in range(KEY_HEADS) if len(found[head]) == length} == full or budget == 1.0
            total = KEY_HEADS * math.ceil(length * budget - 1e-9)
            assert total - KEY_HEADS < sum(map(len, found)) <= total


def test_heads_differ_between_texts(model: hf.PreTrainedModel) -> None:
    """Which heads are heterogeneous depends on the text: that is what sets it apart from a profile."""
    policy = TaskKV(budget=0.6, heterogeneous=(0.25, 0.25), **SMALL)
    chosen = set()
    for seed in range(8):
        for layer, kept in enumerate(kept_after_prompt(model, policy, texts(40, seed=seed))):
            chosen.add((layer, int(kept[0].sum(-1).argmax())))
    assert len(chosen) > LAYERS


def test_the_budget_comes_before_the_number_of_full_heads(model: hf.PreTrainedModel) -> None:
    """Of 40 tokens, a full head costs 34 more than the 6 that each has for sure; 4 × 16 entries leave 40 for that."""
    half = TaskKV(budget=16, heterogeneous=(0.5, 0.5), **SMALL)
    for kept in kept_after_prompt(model, half, texts(40)):
        assert sorted(kept[0].sum(-1).tolist()) == [8, 8, 8, 40]
    none = TaskKV(budget=14, heterogeneous=(0.5, 0.5), **SMALL)
    for kept in kept_after_prompt(model, none, texts(40)):
        assert kept[0].sum(-1).tolist() == [14] * 4
    pyramid = TaskKV(budget=ByLayer(0.5, [1.5, 1, 0.5]), heterogeneous=(0.25, 0.25), **SMALL)
    assert [int(kept.sum()) for kept in kept_after_prompt(model, pyramid, texts(40))] == [118, 79, 40]


def test_of_two_heads_which_are_equally_far_it_is_the_first(llama: hf.PreTrainedModel) -> None:
    for seed in range(5):
        with torch.no_grad(), regard.compress(llama, TaskKV(budget=0.6, heterogeneous=(0.5, 0.5), **SMALL)) as cache:
            llama(**texts(40, seed=seed))
        assert [layer.kept for layer in cache.report().layers] == [[40, 8]] * 3


def test_short_prompts_are_kept(model: hf.PreTrainedModel) -> None:
    for kept in kept_after_prompt(model, TaskKV(budget=8, **SMALL), texts(8, 5)):
        assert kept.sum(-1).tolist() == [[8] * 4, [5] * 4]


@pytest.mark.parametrize("when", [AfterPrompt(), Every(2)], ids=str)
def test_a_text_in_a_padded_batch_is_as_alone(model: hf.PreTrainedModel, when: When) -> None:
    both, policy = texts(40, 30), TaskKV(budget=0.5, when=when, **SMALL)
    alone = {key: value[1:, 10:] for key, value in both.items()}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with regard.compress(model, policy):
        together = model.generate(**both, **options)
    with regard.compress(model, policy) as cache:
        single = model.generate(**alone, **options)
    torch.testing.assert_close(
        torch.stack(together.logits)[:, 1], torch.stack(single.logits)[:, 0], atol=1e-4, rtol=1e-3
    )
    assert cache.report().bytes < 0.65 * cache.report().full_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 200}, r"TaskKV: always keeps 272 entries, but the budget is 200"),
        ({"sinks": -1}, r"TaskKV: sinks must be at least 0, got -1"),
        ({"recent": 0}, r"TaskKV: recent must be at least 1, got 0"),
        ({"window": 0}, r"TaskKV: window must be at least 1, got 0"),
        ({"strongest": 0}, r"TaskKV: strongest must be at least 1, got 0"),
        ({"kernel": 4}, r"TaskKV: kernel must be odd and at least 1, got 4"),
        ({"heterogeneous": (0.5, 1.5)}, r"two shares of the heads from 0 to 1, .* got \(0.5, 1.5\)"),
        ({"heterogeneous": (0.5,)}, r"two shares of the heads from 0 to 1, .* got \(0.5,\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskKV(**arguments)


def test_a_budget_below_sinks_and_recent_tokens(model: hf.PreTrainedModel) -> None:
    """Kept whole, as it is with every policy that always keeps more than a share of a short text."""
    for kept in kept_after_prompt(model, TaskKV(budget=0.1, **SMALL), texts(40)):
        assert kept.all()
