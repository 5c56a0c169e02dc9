"""What a pretrained model is asked: the halves never meet, answers stand where they are said to, and scores are right."""

import inspect
import itertools
import re
from typing import Any

import numpy as np
import pytest
from bench.real_methods import METHODS
from bench.real_tasks import TASKS, Case, Prompts, Task, in_book, is_json, new_words
from bench.real_words import half

from bench import real_tasks, real_words
from regard import demo

LONG = [in_book(name, 400) for name in ("needle", "facts")]
EVERY = [*TASKS.values(), *LONG]


@pytest.fixture(scope="session")
def prompts(words: Any) -> Prompts:
    return Prompts(words, demo.text())


def text(prompts: Prompts, case: Case) -> str:
    return str(prompts.tokenizer.decode(case.example.token_ids))


def highlighted(prompts: Prompts, case: Case) -> str:
    ids = np.array(case.example.token_ids)[case.example.highlighted]
    return str(prompts.tokenizer.decode(ids)).strip()


def answer(prompts: Prompts, case: Case) -> str:
    return str(prompts.tokenizer.decode([case.example.answer])).strip()


def lists() -> list[Any]:
    """Every list of words and of templates."""
    members = itertools.chain(inspect.getmembers(real_words), inspect.getmembers(real_tasks))
    found = [value for name, value in members if name.isupper() and isinstance(value, list | tuple)]
    return [
        value for value in found if value not in (real_tasks.LABELS, real_tasks.LANGUAGES)
    ]  # which both halves have


def test_halves_share_nothing_and_lose_nothing() -> None:
    assert len(lists()) > 20
    for items in lists():
        first, second = half(items, "calibration"), half(items, "measured")
        assert first
        assert second
        assert not set(first) & set(second)
        assert len(first) + len(second) == len(items)


@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.name)
def test_cases_are_those_of_the_seed_and_of_their_half(task: Task, prompts: Prompts) -> None:
    calibration, measured = (task.cases(prompts, part, 24) for part in ("calibration", "measured"))
    assert [text(prompts, case) for case in task.cases(prompts, "measured", 12)] == [
        text(prompts, case) for case in measured[:12]
    ]
    assert len({text(prompts, case) for case in measured}) == 24
    assert not {case.group for case in calibration} & {case.group for case in measured}
    assert not {highlighted(prompts, case) for case in calibration} & {highlighted(prompts, case) for case in measured}
    for case in measured:
        assert prompts.tokenizer.unk_token_id not in case.example.token_ids
        if case.example.choices is not None:
            assert case.example.answer == case.example.choices[0]
            assert len(set(case.example.choices)) == len(case.example.choices)


@pytest.mark.parametrize("task", LONG, ids=lambda task: task.name)
def test_facts_stand_in_the_book_and_one_is_asked_for(task: Task, prompts: Prompts) -> None:
    for case in task.cases(prompts, "measured", 12):
        said = text(prompts, case)
        assert task.length - 120 < len(case.example.token_ids) <= task.length
        fact = highlighted(prompts, case)
        assert fact.endswith(f"is {answer(prompts, case)}.")
        assert said.count(fact) == 1
        begun = said.rsplit("assistant\n", 1)[1]
        assert begun.split()[-2] in fact  # the name that is asked for
        told = re.findall(r"(?:secret word|password) of \w+ is (\w+)\.", said)
        choices = case.example.choices or [case.example.answer]
        assert len(told) == (1 if "needle" in task.name else 8)
        assert sorted(told) == sorted(str(prompts.tokenizer.decode([token])).strip() for token in choices)


def test_the_book_has_to_have_room(prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="8 facts leave no room"):
        in_book("facts", 60).cases(prompts, "measured", 1)


def test_a_sentence_that_is_too_long_is_passed_over(words: Any) -> None:
    long = " ".join(["and so on"] * 50) + "."
    prompts = Prompts(words, f"{long} Paris. {long} Paris.")
    for case in in_book("needle", 80).cases(prompts, "measured", 6):
        assert "Paris." in text(prompts, case)
        assert "and so on" not in text(prompts, case)


def test_capitals_are_false_in_the_text_and_true_in_memory(prompts: Prompts) -> None:
    known = dict(real_words.CAPITALS)
    for name in ("capitals", "memory"):
        for case in TASKS[name].cases(prompts, "measured", 24):
            true, said = known[case.group].split()[0], answer(prompts, case)
            (other,) = (str(prompts.tokenizer.decode([t])).strip() for t in (case.example.choices or ())[1:])
            assert (said == true) == (name == "memory")
            assert (other == true) == (name == "capitals")
            stated = highlighted(prompts, case)
            assert case.group in stated
            assert (said if name == "capitals" else other) in stated
            assert true not in text(prompts, case)


def test_years_differ_in_their_decade(prompts: Prompts) -> None:
    known = dict(real_words.EVENTS)
    for case in TASKS["years"].cases(prompts, "measured", 24):
        true = known[case.group]
        false = true[:2] + answer(prompts, case) + true[3]
        assert false != true
        assert false in highlighted(prompts, case)
        assert text(prompts, case).endswith(true[:2])


def test_choices_offer_the_opposite(prompts: Prompts) -> None:
    opposites = {word: other for row in real_words.OPPOSITES for word, other in (row, row[::-1])}
    for case in TASKS["choice"].cases(prompts, "measured", 24):
        asked = highlighted(prompts, case).rstrip("?").split()[-1]
        offered = [
            line.split(". ")[1] for line in text(prompts, case).replace("<|im_end|>", "").splitlines() if ". " in line
        ]
        assert opposites[asked] == answer(prompts, case)
        assert sorted(offered) == sorted(
            str(prompts.tokenizer.decode([token])).strip() for token in case.example.choices or ()
        )


def test_labels_are_swapped_and_left_out_where_nothing_is_shown(prompts: Prompts) -> None:
    for case in TASKS["swapped"].cases(prompts, "measured", 24):
        blocks = text(prompts, case).split("\n\n")
        assert len(blocks) == 9
        labels = [*(block.split("Sentiment: ")[1] for block in blocks[:-1]), answer(prompts, case)]
        for block, label in zip(blocks, labels, strict=True):
            assert label == ("negative" if set(re.findall(r"\w+", block)) & set(real_words.LIKED) else "positive")
        assert case.bare is not None
        assert prompts.tokenizer.decode(case.bare.token_ids) == blocks[-1]
        assert case.bare.answer == case.example.answer


def test_opposites_are_shown_and_left_out(prompts: Prompts) -> None:
    for case in TASKS["opposites"].cases(prompts, "measured", 24):
        *shown, asked = text(prompts, case).splitlines()
        assert len(shown) == 10
        assert "/".join(sorted([asked.removesuffix(" ->"), answer(prompts, case)])) == case.group
        assert all("/".join(sorted(line.split(" -> "))) != case.group for line in shown)
        assert case.bare is not None
        assert prompts.tokenizer.decode(case.bare.token_ids) == asked


def test_the_word_is_asked_for_in_its_language(prompts: Prompts) -> None:
    rows = {row[0]: row for row in real_words.TRANSLATIONS}
    for case in TASKS["language"].cases(prompts, "measured", 24):
        (language,) = (n for n, name in enumerate(real_tasks.LANGUAGES, 1) if name in highlighted(prompts, case))
        assert answer(prompts, case) == rows[case.group][language]
        assert len(case.example.choices or ()) == 4


def test_one_word_is_followed_by_the_end(prompts: Prompts) -> None:
    known = dict(real_words.CAPITALS)
    for case in TASKS["length"].cases(prompts, "measured", 12):
        assert case.example.answer == prompts.tokenizer.eos_token_id
        assert text(prompts, case).endswith(f"assistant\n{known[case.group]}")


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ('{"name": "Emma", "job": "pilot"}', 1.0),
        ('\n{\n "job": "pilot", "name": "Emma"\n}\n\nMore of it', 1.0),
        ('{"name": "Emma"}', 0.0),
        ('{"name": "Emma", "job": "pilot", "town": "Cork"}', 0.0),
        ('Here it is: {"name": "Emma", "job": "pilot"}', 0.0),
        ('{"name": "Emma", "job": "pi', 0.0),
        ('["name", "job"]', 0.0),
        ("", 0.0),
    ],
)
def test_json(written: str, score: float) -> None:
    assert is_json(written) == score


@pytest.mark.parametrize(
    ("written", "score"),
    [
        ("one two three four five", 1.0),
        ("One two three four, one two three four", 4 / 5),
        ("a a a a a a a", 1 / 4),
        ("two words", 0.0),
    ],
)
def test_new_words(written: str, score: float) -> None:
    assert new_words(written) == score


def test_methods_are_for_tasks_that_there_are() -> None:
    named = {name for method in METHODS.values() for name in method.tasks}
    assert named <= {*TASKS, "needle", "facts"}


def test_no_more_cases_than_differ(words: Any) -> None:
    task = Task("one", lambda prompts, random, part: prompts.case("up ->", "up", " down"))
    with pytest.raises(ValueError, match="one has no 2 different cases to measured, only 1"):
        task.cases(Prompts(words, "One. Two."), "measured", 2)
    with pytest.raises(ValueError, match="begin with the same token"):
        Prompts(words, "One. Two.").case("up ->", "up", " down", [" down"])
    with pytest.raises(ValueError, match="fewer than two sentences"):
        Prompts(words, "One.")
