"""Whether steering helps: what is compared, counted and concluded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.real_methods import METHODS, Bench, Highlighted, Injected, RestOfPrompt, Steered, Twice
from bench.real_tasks import TASKS, Case, Prompts, Task
from bench.steering_real import (
    Comparison,
    Kept,
    Run,
    book_text,
    holm,
    measured,
    p_value,
    resampled,
    show,
    verdict,
    wanted,
)
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.steer.language import (
    Example,
    InjectTask,
    JuiceHeads,
    SoftInjection,
    answer_probability,
    juice,
    pasta,
    run_twice,
)


@pytest.fixture
def llama(words: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def cases() -> list[Case]:
    random = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate((6, 9, 6, 7)):
        ids = torch.randint(3, 90, (length,), generator=random).tolist()
        made.append(Case(Example(ids, 5 + number, [5 + number, 40], slice(1, 3)), str(number), Example(ids[-2:], 5)))
    return made


CHOICE = Task("choice", lambda prompts, random, part: Case(Example([1]), ""))


def test_what_is_equal_in_a_group_is_one_piece_of_evidence() -> None:
    """Ten times the same four differences are no more than the four."""
    differences = np.array([1.0, 0.0, 0.0, 1.0])
    alone = resampled(differences, ["a", "b", "c", "d"], 4000)
    often = resampled(np.repeat(differences, 10), [name for name in "abcd" for _ in range(10)], 4000)
    np.testing.assert_allclose(alone, often)
    assert alone.mean() == pytest.approx(0.5, abs=0.02)
    assert alone.std() == pytest.approx(0.25, abs=0.02)  # √(p (1 − p) / 4)


def test_groups_of_several_sizes_count_by_their_cases() -> None:
    means = resampled(np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"], 4000)
    assert set(means.round(6)) == {0.0, 0.75, 1.0}


def test_p_value() -> None:
    assert p_value(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert p_value(-np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert p_value(np.array([-1.0, 1.0] * 500)) == 1.0
    assert p_value(np.zeros(999)) == 1.0
    assert p_value(np.array([1.0] * 980 + [-1.0] * 19)) == pytest.approx(2 * 20 / 1000)


def test_chance_is_seldom_taken_for_an_effect() -> None:
    random = np.random.default_rng(0)
    names = [str(number) for number in range(100)]
    found = [p_value(resampled(random.choice([-1, 0, 1], 100).astype(float), names, 500)) for _ in range(200)]
    assert np.mean(np.array(found) < 0.05) < 0.1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


@pytest.mark.parametrize(
    ("difference", "p", "said"), [(0.1, 0.01, "helps"), (-0.1, 0.01, "hurts"), (0.1, 0.05, "nothing")]
)
def test_verdict(difference: float, p: float, said: str) -> None:
    assert verdict(difference, p) == said


def test_the_table_says_what_was_found() -> None:
    groups = [str(number) for number in range(40)]
    none, every = np.zeros(40), np.ones(40)
    found = [
        Comparison("PASTA", "JSON", "8 heads", none, every, groups),
        Comparison("PASTA", "language", "8 heads", every, none, groups),
        Comparison("ACT", "choice", "3 heads", every, every, groups),
    ]
    table, claims = show(found, "title")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["verdict"] == ["helps", "hurts", "nothing"]
    assert columns["difference, 95%"][0] == "+1.000 (+1.000 … +1.000)"
    assert columns["examples"][0] == "40 of 40"
    assert list(claims.columns[2].cells) == ["helps 1, hurts 1 of 2", "nothing 1 of 1"]
    assert list(claims.columns[1].cells) == [METHODS["PASTA"].claim, METHODS["ACT"].claim]


def test_what_is_wanted() -> None:
    every = wanted([], [1024, 2048])
    assert len({(method.name, task.name) for method, task in every}) == len(every)
    assert {method.name for method, _ in every} == set(METHODS)
    assert [task.length for _, task in every] == sorted(task.length for _, task in every)
    assert {task.length for _, task in every} == {0, 1024, 2048}
    assert [(m.name, t.name) for m, t in wanted(["PASTA/JSON", "OPERA"], [1024])] == [
        ("PASTA", "JSON"),
        ("OPERA", "writing"),
    ]
    with pytest.raises(ValueError, match="are no comparisons"):
        wanted(["PASTA/needle"], [1024])


def test_kept_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def make() -> str:
        made.append(1)
        return "found"

    assert [Kept(tmp_path / "run")("a name, 1", make) for _ in range(2)] == ["found", "found"]
    assert len(made) == 1
    assert Kept(tmp_path / "run")("another", make) == "found"
    assert len(made) == 2


def test_choices_are_counted_in_the_order_of_the_cases(llama: LlamaForCausalLM, words: Any, cases: list[Case]) -> None:
    with torch.no_grad():
        logits = [llama(input_ids=torch.tensor([list(case.example.token_ids)])).logits[0, -1] for case in cases]
    right = [float(of[case.example.answer] > of[40]) for of, case in zip(logits, cases, strict=True)]
    probability = [answer_probability(of, case.example) for of, case in zip(logits, cases, strict=True)]
    assert measured(llama, words, Steered("plain"), CHOICE, cases).tolist() == right
    np.testing.assert_allclose(measured(llama, words, Steered("plain"), CHOICE, cases, True), probability, rtol=1e-4)


def test_what_is_written_is_scored(llama: LlamaForCausalLM, words: Any, cases: list[Case]) -> None:
    texts = []
    for case in cases:
        ids = torch.tensor([list(case.example.token_ids)])
        written = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        texts.append(words.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    task = Task("written", CHOICE.make, 5, len)
    assert measured(llama, words, Steered("plain"), task, cases).tolist() == list(map(len, texts))


def alone(model: LlamaForCausalLM, example: Example, *edits: Any) -> torch.Tensor:
    with torch.no_grad(), regard.steer(model, *edits):
        found: torch.Tensor = model(input_ids=torch.tensor([list(example.token_ids)])).logits[0, -1]
    return found


def test_methods_do_what_the_library_does(llama: LlamaForCausalLM, cases: list[Case]) -> None:
    batch = [cases[0].example, Example(cases[2].example.token_ids, highlighted=slice(2, 4))]
    spans = [slice(1, 3), slice(2, 4)]
    heads = [(0, 1), (1, 2)]
    twice = juice(JuiceHeads(heads[:1], heads[1:]), 2, 1)
    for steered, edit in (
        (Highlighted("", "Reweight", 5.0), lambda span: regard.Reweight(span, 5.0)),
        (Highlighted("", "Redistribute", 0.3), lambda span: regard.Redistribute(0, span, 0.3)),
        (RestOfPrompt("", pasta, 0.01, heads), lambda span: pasta(span, 6, 0.01, heads)),
    ):
        with torch.no_grad():
            found = steered.next_logits(llama, batch)
        for logits, example, span in zip(found, batch, spans, strict=True):
            torch.testing.assert_close(logits, alone(llama, example, edit(span)), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        found = Twice("", twice).next_logits(llama, batch)
        wanted_logits = run_twice(llama, twice, input_ids=torch.tensor([list(example.token_ids) for example in batch]))[
            :, -1
        ]
    torch.testing.assert_close(found, wanted_logits, rtol=1e-3, atol=1e-4)


def test_a_task_is_injected_where_nothing_is_shown(llama: LlamaForCausalLM, cases: list[Case]) -> None:
    injected = Injected("", SoftInjection({0: torch.ones(4, 8)}, {0: torch.full((4,), 0.5)}))
    read = injected.read(cases[0])
    assert read is cases[0].bare
    assert Steered("plain").read(cases[0]) is cases[0].example
    with torch.no_grad():
        (logits,) = injected.next_logits(llama, [read])
    wanted_logits = alone(llama, read, InjectTask(torch.ones(4, 8), torch.full((4,), 0.5), 1, layers=0))
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class Worth(Steered):
    """A stand-in that says what it is worth."""

    worth: float


def test_the_best_of_the_calibration_is_taken(words: Any, tmp_path: Path) -> None:
    prompts = Prompts(words, book_text(None))
    seen = []

    def value(steered: Any, task: Task, cases: list[Case]) -> np.ndarray:
        seen.append((task.name, len(cases)))
        return np.full(len(cases), steered.worth)

    bench = Bench(None, prompts, value, Kept(tmp_path), lambda task: task.cases(prompts, "calibration", 3), 0)
    tried = [Worth(str(worth), worth) for worth in (0.2, 0.9, 0.5)]
    assert bench.best(TASKS["capitals"], tried).setting == "0.9"
    assert seen == [("capitals", 3)] * 3
    few = bench.few(TASKS["language"], 4)
    assert len(few) == 4
    assert len({len(example) for example in few}) <= 2


def test_a_run_measures_on_the_other_half_and_goes_on(llama: LlamaForCausalLM, words: Any, tmp_path: Path) -> None:
    prompts = Prompts(words, book_text(None))
    run = Run(llama, words, prompts, Kept(tmp_path), calibrate=3, samples=6, fewer={"needle": 2})
    ((method, task),) = wanted(["Reweight/capitals"], [256])
    first = run.compare(method, task)
    assert (first.number, first.method, first.task) == (6, "Reweight", "capitals")
    assert first.groups <= 6
    assert first.low <= first.difference <= first.high
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "Reweight-for-capitals.pickle",
        "Reweight-on-capitals-0-to-6.pickle",
        "plain-on-capitals-0-to-6.pickle",
    ]
    again = Run(None, words, prompts, Kept(tmp_path), calibrate=3, samples=6).compare(method, task)
    assert vars(again) == vars(first)
    ((method, task),) = wanted(["Reweight/needle"], [256])
    assert run.compare(method, task).number == 2


def test_books_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second.")
    (tmp_path / "a.txt").write_text("First.")
    assert book_text(tmp_path) == "First.\nSecond."
