"""Searches read examples of one length in one batch, and of each no more than what comes next."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

import regard
from regard.steer.language import (
    Example,
    JuiceHeads,
    act,
    answer_probability,
    calibrate_juice,
    find_act_heads,
    juice,
    pasta,
    run_twice,
    score_pasta_heads,
)
from regard.steer.language.example import batches, mean_measure

LENGTHS = (7, 9, 7, 12, 9, 7)


@pytest.fixture
def examples() -> list[Example]:
    random = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 61, (length,), generator=random) for length in LENGTHS]
    return [Example(ids, answer=5 + n, highlighted=slice(1 + n % 3, 4)) for n, ids in enumerate(texts)]


def alone(model: LlamaForCausalLM, example: Example) -> float:
    with torch.no_grad():
        return answer_probability(model(input_ids=torch.as_tensor(example.token_ids)[None]).logits[0, -1], example)


def test_batches_hold_every_example_once(examples: list[Example]) -> None:
    found = list(batches(examples))
    assert [[len(example) for example in batch] for batch in found] == [[7, 7, 7], [9, 9], [12]]
    assert {id(example) for batch in found for example in batch} == {id(example) for example in examples}
    long = Example([1] * 1500)
    assert [len(batch) for batch in batches([long, long])] == [1, 1]


def test_each_example_of_a_batch_has_its_own_span(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    scores = score_pasta_heads(llama, examples, 0.01, answer_probability, heads=[(0, 2), (1, 1)])
    for head, score in scores.items():
        each = []
        for example in examples:
            with regard.steer(llama, pasta(example.highlighted, len(example), 0.01, [head])):
                each.append(alone(llama, example))
        assert score == pytest.approx(math.fsum(each) / len(each), rel=1e-5)


def test_sinks_are_those_of_each_text(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    each = []
    for example in examples:
        with regard.steer(llama, *act([(1, 3)], threshold=0.15)):
            each.append(alone(llama, example))
    plain = math.fsum(alone(llama, example) for example in examples)
    found = find_act_heads(llama, examples, threshold=0.15, measure=answer_probability, heads=[(1, 3)])
    assert math.fsum(each) != pytest.approx(plain, rel=1e-6)
    assert found == ([(1, 3)] if math.fsum(each) > plain else [])


def test_both_runs_of_each_text(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    heads = JuiceHeads([(0, 1)], [(1, 2)])

    def mean(up: float, down: float) -> tuple[float, float]:
        found = []
        for example in examples:
            ids = torch.as_tensor(example.token_ids)[None]
            with torch.no_grad():
                logits = run_twice(llama, juice(heads, up, down), input_ids=ids)[0, -1]
            found.append((float(logits.argmax() == example.answer), answer_probability(logits, example)))
        right, probability = zip(*found, strict=True)
        return sum(right), sum(probability)

    best = max([(0, 0), (2, 0), (0, 1), (2, 1)], key=lambda pair: mean(*pair))
    assert repr(calibrate_juice(llama, examples, heads, up=[0, 2], down=[0, 1])) == repr(juice(heads, *best))


def test_the_model_is_asked_for_the_last_logits_only(llama: LlamaForCausalLM, examples: list[Example]) -> None:
    shapes = []
    llama.lm_head.register_forward_hook(lambda module, given, logits: shapes.append(tuple(logits.shape)))
    found = mean_measure(llama, examples, answer_probability, lambda batch: ())
    assert shapes == [(3, 1, 61), (2, 1, 61), (1, 1, 61)]
    assert found == pytest.approx(math.fsum(alone(llama, example) for example in examples) / len(examples), rel=1e-5)
