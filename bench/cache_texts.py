"""Texts of books in which facts were hidden, and what is asked of them: of two halves that share nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONTINUATION = 128
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Half:
    """One half of the material: its share of every book, its names, its nouns, and what numbers leave when halved."""

    name: str
    start: float
    stop: float
    names: Sequence[str]
    fact: str
    needle: str
    odd: int


# fmt: off
CALIBRATION = Half(
    "calibration", 0.02, 0.4,
    ("Alvin", "Bertram", "Cornelia", "Dorothy", "Elmer", "Gilbert", "Harriet", "Irwin", "Jasper", "Mildred"),
    "account number", "house number", 0,
)
REPORT = Half(
    "report", 0.4, 0.98,
    ("Arnold", "Beatrice", "Clarence", "Edith", "Frances", "Herbert", "Leonard", "Norman", "Rosalind", "Walter"),
    "phone number", "ticket number", 1,
)
# fmt: on


@dataclass(frozen=True)
class Question:
    """What is asked, up to where the answer follows, and the answer; whether it is of the one fact of its noun."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    is_needle: bool


@dataclass(frozen=True)
class Text:
    """Tokens with facts among them, how the book goes on, and questions; ``places`` are where each one's fact begins."""

    ids: tuple[int, ...]
    continuation: tuple[int, ...]
    questions: tuple[Question, ...]
    places: tuple[int, ...]

    @property
    def with_answers(self) -> list[int]:
        """Its tokens, and then every question with its answer."""
        return [*self.ids, *(token for one in self.questions for token in one.ids + one.answer)]


def text(books: Sequence[Sequence[int]], encode: Encode, half: Half, length: int, number: int, facts: int) -> Text:
    """The text of so many tokens and of this number in a half, of books as tokens, with a needle and so many facts.

    Raises:
        ValueError: books too short for it.
    """
    chosen = random.Random(f"{half.name} {length} {number}")
    names = chosen.sample(half.names, facts + 1)
    nouns = [half.needle, *[half.fact] * facts]
    values = [str(2 * chosen.randrange(5000, 50000) + half.odd) for _ in names]
    order = chosen.sample(range(len(names)), len(names))  # of the facts in the text
    asked = [(noun, name, value) for noun, name, value in zip(nouns, names, values, strict=True)]
    said = [encode(f"\n\nRemember: the {noun} of {name} is {value}.\n\n") for noun, name, value in asked]
    body = length - sum(map(len, said))
    passage = _passage(books[number % len(books)], half, body + CONTINUATION, chosen)
    ids, places, done = [], [0] * len(said), 0
    for rank, which in enumerate(order):
        cut = max(int(body * (rank + chosen.random()) / len(order)), done)
        ids += passage[done:cut]
        places[which], done = len(ids), cut
        ids += said[which]
    ids += passage[done:body]
    questions = tuple(
        Question(tuple(encode(f"\n\nThe {noun} of {name} is")), tuple(encode(f" {value}")), noun == half.needle)
        for noun, name, value in asked
    )
    return Text(tuple(ids), tuple(passage[body:]), questions, tuple(places))


def _passage(book: Sequence[int], half: Half, length: int, chosen: random.Random) -> list[int]:
    first, last = int(len(book) * half.start), int(len(book) * half.stop) - length
    if last < first:
        raise ValueError(
            f"a book of {len(book):,} tokens has no passage of {length:,} in its part for {half.name}: give longer books, "
            "or shorter lengths"
        )
    start = chosen.randint(first, last)
    return list(book[start : start + length])
