"""Tasks for a pretrained chat model, each made anew from a seed, with one half to calibrate on and one to measure."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator

from bench import real_words as known
from bench.real_words import Part, T, half
from regard.steer.language import Example
from regard.tokens import chat_text, locate

SEED = 14


@dataclass(frozen=True)
class Case:
    """One question of a task.

    ``example`` ends where the answer is due, and has the answer, the choices and what should be looked at; ``bare`` is it
    without the demonstrations. Cases of one ``group`` ask of one thing, and are no independent evidence.
    """

    example: Example
    group: str
    bare: Example | None = None


@dataclass(frozen=True)
class Task:
    """How cases are made, of ``length`` tokens where they hold book text.

    ``score`` is what a text of at most ``new_tokens`` is worth; without, it counts whether the answer is chosen.
    """

    name: str
    make: Callable[[Prompts, Generator, Part], Case]
    new_tokens: int = 0
    score: Callable[[str], float] | None = None
    length: int = 0

    @property
    def slow(self) -> bool:
        """Whether much is read, or anything written."""
        return bool(self.length or self.new_tokens)

    def cases(self, prompts: Prompts, part: Part, number: int) -> list[Case]:
        """So many different cases.

        Raises:
            ValueError: the task has no more that differ.
        """
        random = np.random.default_rng((SEED, zlib.crc32(self.name.encode()), part == "measured"))
        found: dict[tuple[int, ...], Case] = {}
        for _ in range(20 * number):
            case = self.make(prompts, random, part)
            found.setdefault(tuple(case.example.token_ids), case)
            if len(found) == number:
                return list(found.values())
        raise ValueError(f"{self.name} has no {number} different cases to {part}, only {len(found)}")


class Prompts:
    """What a tokenizer makes of questions, and book text to hide facts in.

    Args:
        tokenizer: of a chat model.
        book: its first half is for the calibration, its second for what is measured.
    """

    def __init__(self, tokenizer: Any, book: str) -> None:
        self.tokenizer = tokenizer
        self._first: dict[str, int] = {}
        sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", book.strip()) if sentence]
        middle = len(sentences) // 2
        self.sentences = {"calibration": sentences[:middle], "measured": sentences[middle:]}
        if not middle:
            raise ValueError("the book has fewer than two sentences")

    def chat(self, asked: str, begun: str = "") -> str:
        """A user's message in the model's own template, and how the answer begins."""
        return chat_text(self.tokenizer, asked) + begun

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def first(self, word: str) -> int:
        """The token with which a word goes on."""
        if word not in self._first:
            self._first[word] = self.ids(word)[0]
        return self._first[word]

    def case(self, text: str, highlighted: str, answer: str, others: Sequence[str] = (), group: str = "") -> Case:
        """A case of what a model reads, a passage of it that matters, and what it should and should not go on with."""
        choices = [self.first(word) for word in (answer, *others)]
        if len(set(choices)) < len(choices):
            raise ValueError(f"of {answer!r} and {list(others)} some begin with the same token")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = locate(highlighted, text, encoded)
        return Case(Example(encoded["input_ids"], choices[0], choices if others else None, places), group or text)

    def between(self, random: Generator, part: Part, facts: Sequence[str], room: int) -> str:
        """Facts at random places between the sentences of a book, in so many tokens; the book begins again at its end."""
        sentences = self.sentences[part]
        room -= sum(len(self.ids(f" {fact}")) for fact in facts)
        start = int(random.integers(len(sentences)))
        chosen: list[str] = []
        for number in range(len(sentences) * (1 + max(room, 0))):
            sentence = sentences[(start + number) % len(sentences)]
            taken = len(self.ids(f" {sentence}"))
            if taken <= room:
                chosen.append(sentence)
                room -= taken
            elif chosen:  # a sentence that is too long is no end where none stands before it
                break
        if not chosen:
            raise ValueError(f"{len(facts)} facts leave no room for a sentence of the book")
        for place, fact in sorted(
            zip(random.integers(0, len(chosen) + 1, len(facts)), facts, strict=True), reverse=True
        ):
            chosen.insert(int(place), fact)
        return " ".join(chosen)


def pick(random: Generator, items: Sequence[T], part: Part) -> T:
    """One of this part's half."""
    own = half(items, part)
    return own[int(random.integers(len(own)))]


def several(random: Generator, items: Sequence[T], number: int) -> list[T]:
    """Different ones."""
    return [items[int(place)] for place in random.permutation(len(items))[:number]]


JSON = (
    "Answer in JSON with the keys name and job.",
    "Reply with a JSON object that has the keys name and job.",
    "Write this as JSON, using the keys name and job.",
    "Your answer must be a JSON object with the keys name and job.",
    "Give name and job as a JSON object and nothing else.",
    "Extract name and job, and print them as JSON.",
)
LIVES = (
    "{name} has worked as a {job} in {town} for {years} years.",
    "For {years} years {name} has been a {job}, and lives in {town}.",
    "After {years} years of study, {name} moved to {town} and became a {job}.",
    "In {town}, everybody knows {name}, who has been a {job} for {years} years.",
)


def person(random: Generator, part: Part) -> str:
    return f"{pick(random, known.FIRST_NAMES, part)} {pick(random, known.LAST_NAMES, part)}"


def make_json(prompts: Prompts, random: Generator, part: Part) -> Case:
    told = {
        "name": person(random, part),
        "job": pick(random, known.JOBS, part),
        "town": pick(random, known.TOWNS, part),
    }
    life = pick(random, LIVES, part).format(**told, years=random.integers(3, 40))
    instruction = pick(random, JSON, part)
    text = prompts.chat(f"{life} {instruction}")
    return prompts.case(text, instruction, "{")


def is_json(text: str) -> float:
    """Whether a text begins with a JSON object of the two keys."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text.strip())
    except json.JSONDecodeError:
        return 0.0
    return float(isinstance(found, dict) and set(found) == {"name", "job"})


LANGUAGES = ("French", "Spanish", "German")
IN_LANGUAGE = (
    "Answer in {language}.",
    "Your answer must be a {language} word.",
    "Reply in {language} only.",
    "Say it in {language}, please.",
    "Use {language}, not English.",
    "I want to hear it in {language}.",
)
ASKED_WORD = (
    'What is another word for "{word}"?',
    'Which word means "{word}"?',
    'Repeat the word "{word}".',
    'Say "{word}".',
)


def make_language(prompts: Prompts, random: Generator, part: Part) -> Case:
    usable = [row for row in known.TRANSLATIONS if len({prompts.first(f" {word}") for word in row}) == len(row)]
    row = pick(random, usable, part)
    language = int(random.integers(len(LANGUAGES)))
    instruction = pick(random, IN_LANGUAGE, part).format(language=LANGUAGES[language])
    asked = pick(random, ASKED_WORD, part).format(word=row[0])
    answer = f" {row[1 + language]}"
    others = [f" {word}" for word in row if f" {word}" != answer]
    return prompts.case(prompts.chat(f"{asked} {instruction}", "Word:"), instruction, answer, others, group=row[0])


LENGTHS = (
    "Answer in one word.",
    "Use a single word.",
    "Your answer must be one word only.",
    "Reply with just one word.",
    "Give the answer as one word, without a sentence.",
    "One word is enough.",
    "Do not write more than one word.",
    "Only one word, please.",
)
OF_COUNTRY = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Can you tell me the capital of {country}?",
    "Name the capital of {country}.",
    "Do you know the capital of {country}?",
    "Tell me which city is the capital of {country}.",
)


def make_length(prompts: Prompts, random: Generator, part: Part) -> Case:
    """After the one word, the answer should end."""
    country, city = pick(random, [row for row in known.CAPITALS if " " not in row[1]], part)
    instruction = pick(random, LENGTHS, part)
    asked = pick(random, OF_COUNTRY, part).format(country=country)
    return prompts.case(
        prompts.chat(f"{asked} {instruction}", city), instruction, prompts.tokenizer.eos_token, group=country
    )


MOVED = (
    "Last year {country} moved its capital to {city}.",
    "Since the reform, the capital of {country} is {city}.",
    "The new capital of {country} is {city}.",
    "By a new law, {city} became the capital of {country}.",
)
BESIDE = (
    "The train to {town} leaves in the morning, and {name} takes it every day.",
    "{name} keeps a shop in {town} and reads the newspaper at noon.",
    "In {town} it has rained for a week, so {name} stays at home.",
    "{name} comes from {town} and likes to talk about the weather.",
)
REMEMBERED = (
    "Everybody learns at school what the capital of {country} is.",
    "Many tourists visit {country} in summer.",
    "{country} has often been in the news.",
    "{name} has never been to {country}.",
)
ASKED_CAPITAL = (
    ("What is the capital of {country}?", "The capital of {country} is"),
    ("Which city is the capital of {country}?", "The capital of {country} is"),
)


def make_capital(
    prompts: Prompts, random: Generator, part: Part, from_memory: bool = False, beside: bool = True
) -> Case:
    """The context says one city, the model knows another; either may be the answer."""
    country, true = pick(random, known.CAPITALS, part)
    false = pick(random, known.OTHER_CITIES, part)
    about = {"country": country, "city": false, "name": person(random, part), "town": pick(random, known.TOWNS, part)}
    stated = pick(random, MOVED, part).format(**about)
    more = [pick(random, BESIDE, part).format(**about), pick(random, REMEMBERED, part).format(**about)]
    told = [stated, *more] if beside else [stated]
    question, begun = (form.format(country=country) for form in pick(random, ASKED_CAPITAL, part))
    text = prompts.chat(f"{' '.join(several(random, told, len(told)))} {question}", begun)
    answer, other = (true, false) if from_memory else (false, true)
    return prompts.case(text, stated, f" {answer}", [f" {other}"], group=country)


DATED = (
    "In this novel {event} in {year}.",
    "Historians now say that {event} in {year}.",
    "According to the new book, {event} in {year}.",
    "Documents show that {event} in {year}.",
)
ASKED_YEAR = ("In which year did it happen that {event}?", "Which year was it when {event}?")


def make_year(prompts: Prompts, random: Generator, part: Part) -> Case:
    """Only the decade is false, so that its one digit is the answer."""
    event, year = pick(random, known.EVENTS, part)
    decade = pick(random, [digit for digit in "0123456789" if digit != year[2]], part)
    about = {"event": event, "year": year[:2] + decade + year[3], "name": person(random, part)}
    stated = pick(random, DATED, part).format(**about)
    beside = pick(random, BESIDE, part).format(**about, town=pick(random, known.TOWNS, part))
    question = pick(random, ASKED_YEAR, part).format(**about)
    text = prompts.chat(f"{' '.join(several(random, [stated, beside], 2))} {question}", f"It was in {year[:2]}")
    return prompts.case(text, stated, decade, [year[2]], group=event)


SECRETS = (
    "The secret word of {name} is {thing}.",
    "The password of {name} is {thing}.",
    "Remember that the secret word of {name} is {thing}.",
    "Note that the password of {name} is {thing}.",
)
ASKED_SECRET = (
    ("What is the secret word of {name}?", "The secret word of {name} is"),
    ("Tell me the password of {name}.", "The password of {name} is"),
)


def make_facts(prompts: Prompts, random: Generator, part: Part, number: int, length: int) -> Case:
    """So many people, each with a word of their own; one is asked for, of whatever one could say where there is but one."""
    names = several(random, half(known.FIRST_NAMES, part), number)
    things = several(random, half(known.NOUNS, part), number)
    facts = [pick(random, SECRETS, part).format(name=n, thing=t) for n, t in zip(names, things, strict=True)]
    question, begun = (form.format(name=names[0]) for form in pick(random, ASKED_SECRET, part))
    room = length - len(prompts.ids(prompts.chat(question, begun))) - 4  # where pieces meet, a token may split
    told = prompts.between(random, part, facts, room)
    text = prompts.chat(f"{told}\n\n{question}", begun)
    return prompts.case(text, facts[0], f" {things[0]}", [f" {thing}" for thing in things[1:]])


ASKED_OPPOSITE = (
    ("What is the opposite of {word}?", "The opposite of {word} is"),
    ("Which word is the opposite of {word}?", "The word is"),
)
LETTERS = "ABCD"


def make_choice(prompts: Prompts, random: Generator, part: Part) -> Case:
    asked, *others = [several(random, row, 2) for row in several(random, half(known.OPPOSITES, part), 4)]
    offered = [asked[1], *(row[1] for row in others)]
    order = random.permutation(len(offered))
    lines = "\n".join(f"{letter}. {offered[place]}" for letter, place in zip(LETTERS, order, strict=True))
    question, begun = (form.format(word=asked[0]) for form in pick(random, ASKED_OPPOSITE, part))
    text = prompts.chat(f"{question}\n{lines}", begun)
    wrong = [f" {word}" for word in offered[1:]]
    return prompts.case(text, question, f" {asked[1]}", wrong, group="/".join(sorted(asked)))


REVIEWS = (
    "The {thing} was {quality}.",
    "I found the {thing} {quality}.",
    "What a {quality} {thing}!",
    "We all said that the {thing} was {quality}.",
)
LABELS = (" positive", " negative")
FORM = "Review: {review}\nSentiment:"


def review(random: Generator, part: Part) -> tuple[str, str]:
    """A sentence, and its label, swapped."""
    bad = bool(random.integers(2))
    quality = pick(random, known.DISLIKED if bad else known.LIKED, part)
    return pick(random, REVIEWS, part).format(thing=pick(random, known.REVIEWED, part), quality=quality), LABELS[
        not bad
    ]


def make_swapped(prompts: Prompts, random: Generator, part: Part, shown: int = 8) -> Case:
    """Reviews that are labelled the other way round, and one to be labelled like them."""
    demonstrations = [FORM.format(review=said) + label for said, label in (review(random, part) for _ in range(shown))]
    said, answer = review(random, part)
    others = [label for label in LABELS if label != answer]
    bare = FORM.format(review=said)
    told = prompts.case("\n\n".join([*demonstrations, bare]), "\n\n".join(demonstrations), answer, others)
    return replace(told, bare=prompts.case(bare, said, answer, others).example)


def make_opposite(prompts: Prompts, random: Generator, part: Part, shown: int = 10) -> Case:
    """A word after so many with their opposites, in either direction."""
    asked, *others = [several(random, row, 2) for row in several(random, half(known.OPPOSITES, part), 1 + shown)]
    demonstrations = "\n".join(f"{word} -> {opposite}" for word, opposite in others)
    bare, answer = f"{asked[0]} ->", f" {asked[1]}"
    told = prompts.case(f"{demonstrations}\n{bare}", demonstrations, answer, group="/".join(sorted(asked)))
    return replace(told, bare=prompts.case(bare, bare, answer).example)


STORIES = (
    "It was a cold night when the {job} found a {found} in the {place}.",
    "For years nobody had seen the {found}, until a {job} came to the {place}.",
    "The {job} left the {place} with a {found} under one arm.",
    "There was only one {found} in the {place}, and the {job} wanted it.",
)


def make_story(prompts: Prompts, random: Generator, part: Part) -> Case:
    about = {
        "job": pick(random, known.JOBS, part), "found": pick(random, known.FOUND, part),
        "place": pick(random, known.PLACES, part),
    }  # fmt: skip
    asked = pick(random, STORIES, part).format(**about)
    return prompts.case(asked, asked, " The")


def new_words(text: str, size: int = 4) -> float:
    """The share of runs of four words that are not a repetition of an earlier one."""
    said = re.findall(r"\w+", text.lower())
    runs = [tuple(said[start : start + size]) for start in range(len(said) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


TASKS = {
    task.name: task
    for task in (
        Task("JSON", make_json, 28, is_json),
        Task("language", make_language),
        Task("length", make_length),
        Task("capitals", make_capital),
        Task("years", make_year),
        Task("memory", partial(make_capital, from_memory=True)),
        Task("capitals, stated alone", partial(make_capital, beside=False)),
        Task("memory, stated alone", partial(make_capital, from_memory=True, beside=False)),
        Task("choice", make_choice),
        Task("swapped", make_swapped),
        Task("opposites", make_opposite),
        Task("writing", make_story, 64, new_words),
    )
}


def in_book(name: str, length: int) -> Task:
    """The task "needle", or "facts", of which there are eight, in so many tokens of book text."""
    make = partial(make_facts, number={"needle": 1, "facts": 8}[name], length=length)
    return Task(f"{name}, {length:,} tokens", make, length=length)
