"""What is measured on a cache is what the model does with it."""

from pathlib import Path

import pytest
import torch
from bench.cache_case import Case, is_first_choice
from bench.cache_families import FULL, Family, Reader
from bench.cache_plan import Plan
from bench.cache_real import Bench, best
from bench.cache_texts import Question, Text
from bench.reading import read_apart
from bench.small_models import Results

import regard
from regard.cache import Adaptive, KeepAll, Policy, Quest, SnapKV, StreamingLLM

MODEL, TOKENIZER = regard.mini()
PROSE = "They slept until the sun stood high above the hills, and nobody said a word of it. "


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def case() -> Case:
    said = "The code of Ada is 48213. They slept. The code of Ben is 90177. "
    questions = [Question(ids(f"The code of {name} is"), ids(f" {value}"), False) for name, value in
                 (("Ada", "48213"), ("Ben", "90177"), ("Ben", "48213"))]  # fmt: skip
    text = Text((TOKENIZER.bos_token_id, *ids(said + PROSE * 3)), ids(PROSE), tuple(questions), ())
    return Case(MODEL, text)


@pytest.mark.parametrize("policy", [KeepAll(), SnapKV(budget=Adaptive(0.5), window=8)], ids=str)
@torch.inference_mode()
def test_rows_do_not_see_one_another(policy: Policy) -> None:
    prompt, rows = case().prompt, [[5, 6, 7, 8], [9], [5, 6, 3]]
    together = read_apart(MODEL, prompt.compressed(policy), rows)
    for row, logits in zip(rows, together, strict=True):
        alone = MODEL(torch.tensor([row]), past_key_values=prompt.compressed(policy)).logits[0]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [KeepAll(), StreamingLLM(budget=0.3), Quest(budget=0.5)], ids=str)
@torch.inference_mode()
def test_right_is_what_greedy_decoding_writes(policy: Policy) -> None:
    one = case()
    found = one.later(policy)["right"]
    for right, question in zip(found, one.text.questions, strict=True):
        with regard.compress(MODEL, policy if isinstance(policy, Quest) else KeepAll()):
            past = one.prompt.compressed(policy)
            written: list[int] = []
            given = torch.tensor([question.ids])
            while len(written) < len(question.answer):
                written.append(int(MODEL(given, past_key_values=past).logits[0, -1].argmax()))
                given = torch.tensor([written[-1:]])
        assert right == (written == list(question.answer))
    if type(policy) is KeepAll:
        assert found == [True, True, False]


@torch.inference_mode()
def test_a_question_before_is_compressed_with_the_text() -> None:
    one, policy = case(), SnapKV(budget=0.25, window=8, kernel=9, pooling="max")
    question = one.text.questions[0]
    with regard.compress(MODEL, policy):
        prompt = torch.tensor([[*one.text.ids, *question.ids]])
        written = MODEL.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(question.answer), do_sample=False
        )
    expected = written[0, prompt.shape[1] :].tolist() == list(question.answer)
    assert one.right_before(policy, [question]) == [expected]
    assert one.right_before(KeepAll(), list(one.text.questions)) == [True, True, False]


def test_first_choices_are_those_after_the_question() -> None:
    question = Question((1, 2, 3), (7, 8), False)
    assert is_first_choice([0, 0, 7, 8], question)
    assert not is_first_choice([0, 0, 7, 9], question)
    assert not is_first_choice([7, 8, 0, 8], question)


def test_the_best_settings_are_the_first_of_the_highest() -> None:
    of = {"a": Family(SnapKV, [{"window": 8}, {"window": 16}, {"window": 4}]), "b": Family(SnapKV)}
    searched = {"a": {"{'window': 8}": 0.2, "{'window': 16}": 0.5, "{'window': 4}": 0.5}}
    assert best(searched, of) == {"a": {"window": 16}, "b": {}}


@torch.inference_mode()
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan({256: 1}, calibrated=1, budgets=(0.5,), facts=4, asked_before=1)
    book = list(ids(PROSE * 200))
    of = {
        FULL: Family(lambda budget: KeepAll(), budgets=(1.0,)),
        "SnapKV": Family(SnapKV, [{"window": 8}, {"window": 16}]),
    }
    for _ in range(2):
        bench = Bench(Reader(MODEL, TOKENIZER, []), [book], plan, Results(tmp_path / "found.jsonl"), "mini")
        searched = bench.searched(of)
        found = bench.measured(of, best(searched, of))
        monkeypatch.setattr(Case, "later", None)  # nothing is measured twice
    assert set(searched["SnapKV"]) == {"{'window': 8}", "{'window': 16}"}
    assert set(found[256]) == {(FULL, 1.0), ("SnapKV", 0.5)}
    full, compressed = found[256][FULL, 1.0][0], found[256]["SnapKV", 0.5][0]
    assert (full["bytes"], full["same"], compressed["bytes"]) == (1.0, 1.0, 0.5)
    assert (len(full["right"]), len(full["before"])) == (5, 1)
