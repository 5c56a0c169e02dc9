"""Facts stand where they are said to, and the halves of the material share nothing."""

import random

import pytest
from bench.cache_texts import CALIBRATION, CONTINUATION, REPORT, Half, Text, text

import regard

_, TOKENIZER = regard.mini()
BOOKS = [list(range(first, first + 20_000)) for first in (100_000, 200_000)]  # of tokens that no fact has


def encode(said: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(said, add_special_tokens=False)
    return ids


def made(half: Half, number: int, facts: int = 4) -> Text:
    return text(BOOKS, encode, half, 900, number, facts)


@pytest.mark.parametrize("half", [CALIBRATION, REPORT], ids=lambda half: half.name)
@pytest.mark.parametrize("facts", [4, 9])
@pytest.mark.parametrize("number", range(3))
def test_facts_stand_where_they_are_said(half: Half, number: int, facts: int) -> None:
    one = made(half, number, facts)
    assert len(one.ids) == 900
    assert [question.is_needle for question in one.questions] == [True] + [False] * facts
    for question, place in zip(one.questions, one.places, strict=True):
        asked, answer = TOKENIZER.decode(question.ids).strip(), TOKENIZER.decode(question.answer)
        said = TOKENIZER.decode([token for token in one.ids[place : place + 60] if token < 100_000])
        assert said.strip().startswith(f"Remember: t{asked[1:]}{answer}.")
    spread = sorted(one.places)
    assert all(spread[rank] < 900 * (rank + 1) / len(spread) + 60 for rank in range(len(spread)))
    values = [question.answer for question in one.questions]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("half", [CALIBRATION, REPORT], ids=lambda half: half.name)
def test_the_book_goes_on_where_the_text_ends(half: Half) -> None:
    one = made(half, 1)
    passage = [token for token in one.ids if token >= 200_000]
    whole = [*passage, *one.continuation]
    assert len(one.continuation) == CONTINUATION
    assert whole == list(range(whole[0], whole[0] + len(whole)))


def test_halves_share_nothing() -> None:
    halves = [[made(half, number) for number in range(20)] for half in (CALIBRATION, REPORT)]
    passages = [{t for one in half for t in (*one.ids, *one.continuation) if t >= 100_000} for half in halves]
    assert not passages[0] & passages[1]
    numbers = [{TOKENIZER.decode(q.answer) for one in half for q in one.questions} for half in halves]
    assert not numbers[0] & numbers[1]
    assert not set(CALIBRATION.names) & set(REPORT.names)
    assert not {CALIBRATION.fact, CALIBRATION.needle} & {REPORT.fact, REPORT.needle}


def test_a_text_is_the_same_again() -> None:
    random.seed(1)
    first = made(REPORT, 3)
    random.seed(2)
    assert made(REPORT, 3) == first


def test_too_short_books_are_refused() -> None:
    with pytest.raises(ValueError, match="no passage of"):
        text([BOOKS[0][:1000]], encode, REPORT, 900, 0, 4)
