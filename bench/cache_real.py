"""What compressing the cache of a pretrained language model gains and loses: every policy that chooses among text.

    python -m bench.cache_real --books FOLDER [--kvpress PYTHON] [--plot FILE] [--save]    40 minutes on one core
    python -m bench.cache_real --quick                                                     shows that it runs

In passages of books facts are hidden: one needle, and four of one kind. Each text is read once, and every policy compresses
it at every budget: before it is known what will be asked, and with one question read too. An answer counts if each of its
tokens is the model's first choice, so that greedy decoding writes it. From the same caches: the likelihood of how the book
goes on, and how much of what the model writes by itself with the full cache is written still. Settings of policies are
searched on one half of the material, and all figures are of the other. A run that was interrupted goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from training.evaluate import proportion
from training.tokenizer import books as read_books

import regard
from bench import real_model
from bench.cache_texts import CALIBRATION, REPORT, Half, Question, Text, text
from bench.other_interpreter import OtherInterpreter
from bench.prompt import Prompt
from bench.reading import read_apart
from bench.results import Report, command_line
from bench.small_models import Results
from regard import demo
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    KeepAll,
    KeyDiff,
    Knorm,
    KVzip,
    Merge,
    ObservedAttention,
    Policy,
    Pyramid,
    QAdA,
    QFilters,
    Quantise,
    Quest,
    Random,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
    ThinK,
)
from regard.cache.report import report as report_of
from regard.models import load

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
SEARCHED = 1 / 8  # the budget at which settings are compared
PRESSES = (
    "Knorm", "SnapKV", "SnapKV, by head", "ExpectedAttention", "KVzip", "TOVA", "StreamingLLM", "observed attention"
)  # fmt: skip
WRITTEN = 32  # tokens of what the model writes by itself
STEPS = 8  # timed
Settings = dict[str, Any]
Measures = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A policy by its budget and settings: those to be searched, the first of which are its usual ones."""

    make: Callable[..., Policy]
    settings: Sequence[Settings] = ({},)
    budgets: Sequence[float] = BUDGETS


ALL = Family(lambda budget: KeepAll(), budgets=(1.0,))


@dataclass(eq=False)
class Reader:
    """A model with what policies need of it, found once."""

    model: Any
    tokenizer: Any
    samples: list[list[int]]

    @cached_property
    def filters(self) -> Tensor:
        """For `QFilters`."""
        return QFilters.calibrate(self.model, self.samples)

    @cache  # noqa: B019 - there is one reader
    def retrieval(self, share: float) -> dict[int, list[int]]:
        """The share of heads that look most at what is to be copied."""
        return RetrievalHeads.profile(self.model, self.samples, share)

    def retrieval_heads(self, budget: float, full: float) -> Policy:
        """This part of the budget for heads that keep all, and the rest shared by the others."""
        heads = self.model.config.num_hidden_layers * self.model.config.num_key_value_heads
        number = round(full * budget * heads)
        rest = (budget * heads - number) / (heads - number)
        found = self.retrieval(number / heads) if number else {}
        return RetrievalHeads(budget=rest, heads=found, when=AfterPrompt())


def grid(**values: Sequence[Any]) -> list[Settings]:
    """Every combination of some settings."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def families(reader: Reader) -> dict[str, Family]:
    """Every policy that stands by itself."""
    at_once = {"when": AfterPrompt()}
    return {
        "random": Family(Random),
        "StreamingLLM": Family(partial(StreamingLLM, **at_once), grid(sinks=(4, 1, 16))),
        "Knorm": Family(Knorm),
        "KeyDiff": Family(KeyDiff),
        "Q-Filters": Family(lambda budget: QFilters(budget=budget, filters=reader.filters)),
        "observed attention": Family(
            partial(ObservedAttention, **at_once), grid(recent=(0.5, 0.0), average=(False, True))
        ),
        "TOVA": Family(partial(TOVA, **at_once)),
        "SnapKV, usual": Family(SnapKV),
        "SnapKV": Family(SnapKV, grid(window=(32, 16, 8), kernel=(5, 9, 17, 33), pooling=("mean", "max"))),
        "Task-KV": Family(
            partial(TaskKV, sinks=4), grid(recent=(64, 16), kernel=(7, 17, 33))
        ),
        "ExpectedAttention": Family(
            ExpectedAttention, grid(future=(512, 64), values=(True, False))
        ),
        "KVzip": Family(
            partial(KVzip, reader.tokenizer, chunk=500), grid(across=("model", "layer", "head"))
        ),
        "KVzip+": Family(partial(KVzip, reader.tokenizer, chunk=500, normalized=True)),
        "retrieval heads": Family(
            lambda budget, full: reader.retrieval_heads(budget, full), grid(full=(0.75, 0.5, 0.9))
        ),
    }  # fmt: skip


def families_around(best: Mapping[str, Settings]) -> dict[str, Family]:
    """Those around another policy, or with another budget or rest, by its best settings."""
    snap, expected = partial(SnapKV, **best["SnapKV"]), partial(ExpectedAttention, **best["ExpectedAttention"])
    shares = grid(floor=(0.2, 0.0, 0.5))
    return {
        "SnapKV, by head": Family(lambda budget, floor: snap(budget=Adaptive(budget, floor)), shares),
        "SnapKV, pyramid": Family(lambda budget, beta: snap(budget=Pyramid(budget, beta)), grid(beta=(20, 2))),
        "SnapKV, rest merged": Family(partial(snap, rest=Merge())),
        "CriticalKV of SnapKV": Family(
            lambda budget, first: CriticalKV(snap(budget=Adaptive(budget)), first=first), grid(first=(0.5, 0.25))
        ),
        "ChunkKV of SnapKV": Family(
            lambda budget, length: ChunkKV(snap(budget=budget), length=length), grid(length=(10, 5, 20))
        ),
        "ThinK of SnapKV": Family(lambda budget: ThinK(snap(budget=budget))),
        "ExpectedAttention, by head": Family(lambda budget, floor: expected(budget=Adaptive(budget, floor)), shares),
    }


def families_whole() -> dict[str, Family]:
    """Those that keep every entry: with few bits, or in part unread by each step."""
    last = partial(StreamingLLM, 64, sinks=0, when=AfterPrompt())
    return {
        "8 bits": Family(lambda budget: last(rest=Quantise(bits=8)), budgets=(1.0,)),
        "4 bits": Family(lambda budget: last(rest=Quantise(bits=4)), budgets=(1.0,)),
        "Quest": Family(Quest),
        "QAdA": Family(lambda budget: QAdA(threshold=budget, recent=256), budgets=(0.9,)),
    }


# --- measuring -------------------------------------------------------------------------------------------------------------


def block(model: Any, policy: Policy) -> AbstractContextManager[object]:
    """In which a cache is read: policies that choose at each step do so, others have chosen."""
    return regard.compress(model, policy if reads_in_steps(policy) else KeepAll())


def reads_in_steps(policy: Policy) -> bool:
    """Whether it keeps all, of which each step reads a part."""
    return isinstance(policy, Quest | QAdA)


def row_of(question: Question) -> list[int]:
    """A question and its answer but for the last token."""
    return [*question.ids, *question.answer[:-1]]


def is_first_choice(choices: Sequence[int], question: Question) -> bool:
    """Whether each token of the answer is the first choice after the question and what is right before it."""
    return list(choices[len(question.ids) - 1 :]) == list(question.answer)


def answered_in_steps(model: Any, compressed: Any, question: Question) -> bool:
    """Whether a question is answered, read at once, and the answer token by token."""
    choices = []
    for ids in (question.ids, *((token,) for token in question.answer[:-1])):
        choices += model(torch.tensor([ids]), past_key_values=compressed).logits[0].argmax(dim=-1).tolist()
    compressed.crop(1 - len(question.ids) - len(question.answer))
    return is_first_choice(choices, question)


@dataclass
class Case:
    """A text that is read once, when it is first asked for."""

    reader: Reader
    text: Text
    is_timed: bool = False
    _after: dict[Question, Prompt] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> Prompt:
        """The text, read."""
        return Prompt(self.reader.model, torch.tensor([self.text.ids]))

    def asked(self, question: Question) -> Prompt:
        """The text with a question, read."""
        if question not in self._after:
            self._after[question] = Prompt(self.reader.model, torch.tensor([question.ids]), self.prompt)
        return self._after[question]

    @cached_property
    def written(self) -> list[int]:
        """What the model writes on, greedily, with the full cache."""
        model, full = self.reader.model, self.prompt.compressed(KeepAll())
        tokens = [int(self.prompt.logits.argmax())]
        while len(tokens) < WRITTEN + 1:
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=full).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def later(self, policy: Policy) -> Measures:
        """With questions that come after the text was compressed."""
        prompt, start = self.prompt, time.process_time()
        compressed = prompt.compressed(policy)
        taken, model = time.process_time() - start, self.reader.model
        found = report_of(compressed, str(policy), policy.rest.frees)
        measures: Measures = {"bytes": found.bytes / found.full_bytes, "kept": found.kept, "seconds": taken}
        with block(model, policy):
            if reads_in_steps(policy):
                return measures | {"right": [answered_in_steps(model, compressed, one) for one in self.text.questions]}
            if self.is_timed:
                measures["step"] = self._step(compressed)
            logits = read_apart(model, compressed, self.rows)
        loss = functional.cross_entropy(logits[-2][:-1].float(), torch.tensor(self.rows[-2][1:]))
        return measures | self.judged([row.argmax(dim=-1).tolist() for row in logits], float(loss))

    @cached_property
    def rows(self) -> list[list[int]]:
        """What is read after the text: each question, how the book goes on, and what the model writes by itself."""
        return [*map(row_of, self.text.questions), list(self.text.continuation), self.written[:-1]]

    def judged(self, choices: Sequence[Sequence[int]], loss: float) -> Measures:
        """What first choices after each token of the rows are worth, beside the loss of the book's next tokens."""
        right = [is_first_choice(*pair) for pair in zip(choices, self.text.questions, strict=False)]
        same = statistics.mean(own == other for own, other in zip(choices[-1], self.written[1:], strict=True))
        return {"right": right, "loss": loss, "same": same}

    def right_later(self, policy: Policy) -> list[bool]:
        """Answers alone, to questions that come after the text was compressed."""
        compressed, rows = self.prompt.compressed(policy), [row_of(one) for one in self.text.questions]
        with block(self.reader.model, policy):
            answers = [row.argmax(dim=-1).tolist() for row in read_apart(self.reader.model, compressed, rows)]
        return [is_first_choice(*pair) for pair in zip(answers, self.text.questions, strict=True)]

    def pressed(self, presses: OtherInterpreter, name: str, budget: float) -> Measures:
        """As `later`, with a press of kvpress."""
        found = presses.ask(name=name, budget=budget, ids=self.text.ids, rows=self.rows)
        return {"bytes": budget} | self.judged(found["choices"], found["losses"][-2])

    def right_before(self, policy: Policy, questions: Sequence[Question]) -> list[bool]:
        """Answers to questions that were read, each by itself, before the text was compressed with them."""
        return [self._right_before(policy, question) for question in questions]

    def _right_before(self, policy: Policy, question: Question) -> bool:
        prompt, answer = self.asked(question), question.answer
        if int(prompt.logits.argmax()) != answer[0]:
            return False  # which the last token of the prompt has said before anything was compressed
        compressed = prompt.compressed(policy)
        with block(self.reader.model, policy):
            logits = self.reader.model(torch.tensor([answer[:-1]]), past_key_values=compressed).logits
        return bool(logits[0].argmax(dim=-1).tolist() == list(answer[1:]))

    def _step(self, compressed: Any) -> float:
        """Seconds of a decoding step, the median, of the processor."""
        token, taken = torch.tensor([self.text.continuation[:1]]), []
        for _ in range(STEPS + 2):
            start = time.process_time()
            self.reader.model(token, past_key_values=compressed)
            taken.append(time.process_time() - start)
        compressed.crop(-STEPS - 2)
        return statistics.median(taken[2:])


# --- the run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How many texts of each length, how many settings are compared on, and at which budgets."""

    lengths: Mapping[int, int]
    calibrated: int
    budgets: Sequence[float] = BUDGETS
    asked_before: int = 2  # questions of each of the shortest texts, which are read with the text
    facts: int = 4  # beside the needle
    facts_of_longer: int = 9
    pressed: int = 4  # texts that presses of kvpress compress
    pressed_budgets: Sequence[float] = (1 / 4, 1 / 8)
    sample: int = 1024  # tokens of texts from which filters and heads are found

    @property
    def shortest(self) -> int:
        """The length at which settings are searched, and at which questions come before too."""
        return min(self.lengths)


FULL = Plan({2048: 6, 4096: 2, 7500: 1}, calibrated=3)
QUICK = Plan({512: 1}, calibrated=0, budgets=(1 / 4,), asked_before=1, pressed=1, sample=256)
Row = tuple[str, float]  # a policy's name and its budget
Found = dict[int, dict[Row, list[Measures]]]  # by length, a text's measures each


class Bench:
    """Everything that is measured, as far as it is not among the results."""

    def __init__(self, reader: Reader, books: list[list[int]], plan: Plan, results: Results, origin: str) -> None:
        self.reader, self.books, self.plan, self.results = reader, books, plan, results
        self.origin = origin  # of model and books: results of others are not taken for theirs

    def case(self, half: Half, length: int, number: int) -> Case:
        """One text of a half."""
        encode = partial(self.reader.tokenizer.encode, add_special_tokens=False)
        facts = self.plan.facts if length == self.plan.shortest else self.plan.facts_of_longer
        return Case(self.reader, text(self.books, encode, half, length, number, facts), is_timed=number == 0)

    def searched(self, of: Mapping[str, Family]) -> dict[str, dict[str, float]]:
        """The share of answers that are right by a policy's name and its settings, questions later and before alike."""
        rights: dict[str, dict[str, list[float]]] = {}
        for number in range(self.plan.calibrated):
            case = self.case(CALIBRATION, self.plan.shortest, number)
            for name, family in of.items():
                for settings in family.settings if len(family.settings) > 1 else ():
                    key = f"{self.origin}, search, text {number}, {name}, {settings}"
                    right = self.results.one(
                        key, partial(self._right, case, partial(family.make, budget=SEARCHED, **settings))
                    )
                    rights.setdefault(name, {}).setdefault(str(settings), []).append(right)
        return {name: {which: statistics.mean(one) for which, one in own.items()} for name, own in rights.items()}

    def _right(self, case: Case, make: Callable[[], Policy]) -> float:
        policy = make()
        later = statistics.mean(case.right_later(policy))
        if isinstance(policy, KVzip):
            return later
        return (later + statistics.mean(case.right_before(policy, case.text.questions[: self.plan.asked_before]))) / 2

    def measured(self, of: Mapping[str, Family], chosen: Mapping[str, Settings]) -> Found:
        """What each policy keeps of the texts of the other half."""
        rows = {
            (name, budget): partial(family.make, budget=budget, **chosen[name])
            for name, family in of.items()
            for budget in (self.plan.budgets if family.budgets is BUDGETS else family.budgets)
        }
        found: Found = {}
        total = sum(self.plan.lengths.values()) * len(rows)
        with Progress(transient=True) as bar:
            task = bar.add_task("", total=total)
            for length, number in [(length, n) for length, texts in self.plan.lengths.items() for n in range(texts)]:
                case = self.case(REPORT, length, number)
                for row, make in rows.items():
                    bar.update(task, advance=1, description=f"{length} tokens, text {number}, {row[0]}, {row[1]:.0%}")
                    key = f"{self.origin}, {length} tokens, text {number}, {row[0]}, {row[1]}, {chosen[row[0]]}"
                    measures = self.results.one(key, partial(self._measures, case, make))
                    if measures:
                        found.setdefault(length, {}).setdefault(row, []).append(measures)
        return found

    def pressed(self, presses: OtherInterpreter) -> dict[Row, list[Measures]]:
        """What presses of kvpress keep of the first of the shortest texts."""
        found: dict[Row, list[Measures]] = {}
        for number in range(self.plan.pressed):
            case = self.case(REPORT, self.plan.shortest, number)
            for name, budget in product(PRESSES, self.plan.pressed_budgets):
                key = f"{self.origin}, kvpress, {self.plan.shortest} tokens, text {number}, {name}, {budget}"
                measures = self.results.one(key, partial(case.pressed, presses, name, budget))
                found.setdefault((f"kvpress: {name}", budget), []).append(measures)
        return found

    def _measures(self, case: Case, make: Callable[[], Policy]) -> Measures:
        policy, shortest = make(), len(case.text.ids) == self.plan.shortest
        if reads_in_steps(policy) and not shortest:
            return {}
        measures = case.later(policy)
        if shortest and not isinstance(policy, KVzip) and not reads_in_steps(policy):
            measures["before"] = case.right_before(policy, case.text.questions[: self.plan.asked_before])
        return measures


def best(searched: Mapping[str, Mapping[str, float]], of: Mapping[str, Family]) -> dict[str, Settings]:
    """Of each family the settings of the highest share; of equal ones those that come first."""
    chosen = {}
    for name, family in of.items():
        shares = searched.get(name, {})
        chosen[name] = max(family.settings, key=lambda settings: shares.get(str(settings), 0.0))
    return chosen


# --- what is shown ---------------------------------------------------------------------------------------------------------


def search_table(searched: Mapping[str, Mapping[str, float]], of: Mapping[str, Family], plan: Plan) -> Table:
    """What the usual settings of each policy gain on the calibration half, and its best ones."""
    title = (
        f"settings, by answers right on {plan.calibrated} texts of the calibration half, {plan.shortest:,} tokens, "
        f"{SEARCHED:.1%} of the entries"
    )
    table = Table("policy", "tried", "usual", "right", "best", "best right", "worst", "worst right", title=title)
    for name, shares in searched.items():
        first, ranked = str(of[name].settings[0]), sorted(shares, key=lambda which: -shares[which])
        high = max(of[name].settings, key=lambda settings: shares[str(settings)])
        cells = [cell for which in (first, str(high), ranked[-1]) for cell in (_plain(which), f"{shares[which]:.0%}")]
        table.add_row(name, str(len(shares)), *cells)
    return table


def _plain(settings: str) -> str:
    return settings.strip("{}").replace("'", "")


def shares(measures: Sequence[Measures], what: str = "right", questions: slice = slice(None)) -> str:
    """Answers right of all, with Wilson's 95% interval; empty where none was asked for."""
    right = [answer for one in measures for answer in one.get(what, [])[questions]]
    if not right:
        return ""
    figure = proportion("", sum(right), len(right))
    return f"{figure.value:.2f} ({figure.low:.2f}–{figure.high:.2f})"


def perplexity(measures: Sequence[Measures], full: Sequence[Measures]) -> float | None:
    """That of the books' next tokens, as a ratio to the full cache's of the same texts."""
    pairs = [(one["loss"], other["loss"]) for one, other in zip(measures, full, strict=False) if "loss" in one]
    return math.exp(statistics.mean(own - other for own, other in pairs)) if pairs else None


def table_of(found: Found, plan: Plan) -> Table:
    """A line for each policy and budget."""
    lengths, short = list(plan.lengths), plan.shortest
    asked = ", ".join(f"{texts} texts of {length:,}" for length, texts in plan.lengths.items())
    title = (
        f"{asked} tokens, a needle and {plan.facts} facts each ({plan.facts_of_longer} in longer ones): answers right (95% "
        "interval), and beside the full cache"
    )
    columns = ["bytes", f"needle, {short:,}", f"facts, {short:,}", *(f"all, {length:,}" for length in lengths[1:])]
    table = Table(
        "policy",
        *columns,
        f"asked before, {short:,}",
        "perplexity, ×",
        "same words",
        "tokens/s, ×",
        "chosen in, s",
        title=title,
    )
    budgets = dict(reversed(found[short]))  # the first of each, whose choice found what others reuse
    for (name, budget), measures in found[short].items():
        whole = found[short]["full cache", 1.0]
        loss = perplexity(measures, whole)
        same = [one["same"] for one in measures if "same" in one]
        table.add_row(
            name if budget == 1 else f"{name}, {_fraction(budget)}",
            f"{statistics.mean(one['bytes'] for one in measures):.3f}",
            shares(measures, questions=slice(0, 1)),
            shares(measures, questions=slice(1, None)),
            *(shares(found[length].get((name, budget), [])) for length in lengths[1:]),
            shares(measures, "before"),
            "" if loss is None else f"{loss:.3f}",
            f"{statistics.mean(same):.2f}" if same else "",
            _speed(found[lengths[-1]], (name, budget)),
            _seconds(found[short][name, budgets[name]]),
        )
    return table


def _fraction(budget: float) -> str:
    return f"1/{round(1 / budget)}" if abs(1 / budget - round(1 / budget)) < 1e-9 else f"{budget}"


def _seconds(measures: Sequence[Measures]) -> str:
    """What choosing takes, the median."""
    return f"{statistics.median(one['seconds'] for one in measures):.2f}" if "seconds" in measures[0] else ""


def _speed(measures: Mapping[Row, Sequence[Measures]], row: Row) -> str:
    """Tokens for each second, as a ratio to the full cache's."""
    own, full = (measures.get(which, [{}])[0].get("step") for which in (row, ("full cache", 1.0)))
    return f"{full / own:.2f}" if own and full else ""


@dataclass(frozen=True)
class Mean:
    """A policy's mean over the budgets, with the interval of a bootstrap over the texts."""

    name: str
    value: float
    low: float
    high: float


def means(found: Found, plan: Plan, measure: Callable[[Measures, Measures], float | None]) -> list[Mean]:
    """Policies that have a figure at every budget, the highest mean first."""
    names = dict.fromkeys(name for name, budget in found[plan.shortest] if budget in plan.budgets)
    ranked = []
    for name in names:
        by_text: list[float] = []
        for of_length in found.values():
            full = of_length["full cache", 1.0]
            for number, whole in enumerate(full):
                rows = [of_length.get((name, budget), []) for budget in plan.budgets]
                values = [measure(row[number], whole) for row in rows if len(row) > number]
                known = [value for value in values if value is not None]
                if known:
                    by_text.append(statistics.mean(known))
        if by_text:
            drawn = np.random.default_rng(0).choice(by_text, (2000, len(by_text))).mean(axis=1)
            low, high = np.percentile(drawn, [2.5, 97.5])
            ranked.append(Mean(name, statistics.mean(by_text), float(low), float(high)))
    return sorted(ranked, key=lambda one: -one.value)


def right_later(own: Measures, full: Measures) -> float | None:
    """The share of answers right, questions later."""
    return statistics.mean(own["right"])


def right_before(own: Measures, full: Measures) -> float | None:
    """The share of answers right, questions before."""
    return statistics.mean(own["before"]) if own.get("before") else None


def less_loss(own: Measures, full: Measures) -> float | None:
    """How much less a token of the book is lost than with the full cache: below 0, in nats."""
    return full["loss"] - own["loss"] if "loss" in own else None


RANKED = {
    "answers, asked later": right_later,
    "answers, asked before": right_before,
    "next tokens, nats gained": less_loss,
}


def best_table(found: Found, plan: Plan) -> Table:
    """The first three of each ranking."""
    title = "the best, by the mean over the budgets and all texts (95% interval over texts)"
    table = Table("by", "first", "second", "third", "last", title=title)
    for what, measure in RANKED.items():
        ranked = means(found, plan, measure)
        table.add_row(
            what, *(f"{one.name}: {one.value:.2f} ({one.low:.2f}–{one.high:.2f})" for one in [*ranked[:3], ranked[-1]])
        )
    return table


def plot(found: Found, plan: Plan) -> go.Figure:
    """Quality against bytes: the best three of each ranking and some to compare them with, the others grey."""
    panels = ("questions after the text was compressed", "questions before", "perplexity of the book's next tokens")
    figure = make_subplots(cols=3, subplot_titles=panels, horizontal_spacing=0.06)
    named = {one.name for measure in RANKED.values() for one in means(found, plan, measure)[:3]}
    named |= {"SnapKV, usual", "StreamingLLM", "random", "TOVA"}
    names = dict.fromkeys(name for name, budget in found[plan.shortest] if budget in plan.budgets)
    colours = dict(zip([name for name in names if name in named], qualitative.Dark24, strict=False))
    for name in sorted(names, key=lambda name: name in named):
        for column, values in enumerate(_lines(found, plan, name), start=1):
            if values:
                figure.add_scatter(
                    x=[x for x, _ in values], y=[y for _, y in values], name=name, legendgroup=name, row=1, col=column,
                    mode="lines+markers" if name in named else "lines", showlegend=name in named and column == 1,
                    line={"color": colours.get(name, "#dddddd"), "width": 2 if name in named else 1},
                )  # fmt: skip
    for column, values in enumerate(_lines(found, plan, "full cache"), start=1):
        figure.add_hline(y=values[0][1], line={"dash": "dot", "color": "#555555"}, row=1, col=column)
    ticks = [100 * budget for budget in sorted(plan.budgets)]
    figure.update_xaxes(type="log", title="bytes of the cache, %", tickvals=ticks, ticktext=[f"{t:.3g}" for t in ticks])
    figure.update_yaxes(title="answers right, %", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="answers right, %", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="× that of the full cache (dotted)", range=[0.95, 2.0], row=1, col=3)
    title = "What SmolLM2-135M-Instruct still knows of book text with a compressed cache"
    figure.update_layout(
        template="plotly_white", width=1350, height=520, title=title, margin={"t": 90, "b": 60, "r": 20}
    )
    return figure


def _lines(found: Found, plan: Plan, name: str) -> list[list[tuple[float, float]]]:
    """Percent of bytes and what came of it, for each panel."""
    lines: list[list[tuple[float, float]]] = [[], [], []]
    for budget in plan.budgets if name != "full cache" else (1.0,):
        pairs = [
            (own, full)
            for of_length in found.values()
            for own, full in zip(of_length.get((name, budget), []), of_length["full cache", 1.0], strict=False)
        ]
        size = 100 * statistics.mean(own["bytes"] for own, _ in pairs)
        for line, what in zip(lines, ("right", "before"), strict=False):
            answers = [answer for own, _ in pairs for answer in own.get(what, [])]
            line += [(size, 100 * statistics.mean(answers))] if answers else []
        losses = [own["loss"] - full["loss"] for own, full in pairs if "loss" in own]
        lines[2] += [(size, math.exp(statistics.mean(losses)))] if losses else []
    return lines


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="one short text of the chapter that ships, usual settings")
    parser.add_argument("--books", type=Path, help="folder of books, .md or .txt, of 20,000 words and more each")
    parser.add_argument("--model", help="folder, .gguf file or name; by default SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache; float32 where bfloat16 is slow")
    parser.add_argument(
        "--kvpress", metavar="PYTHON", help="an interpreter that has kvpress, to measure its presses beside"
    )
    parser.add_argument("--only", nargs="*", help="these policies only, and what they need")
    parser.add_argument(
        "--results", type=Path, help="where a run goes on; by default run/cache_real.jsonl, not with --quick"
    )
    parser.add_argument("--plot", type=Path, help="write quality against bytes as a picture, an HTML page")
    arguments = parser.parse_args()
    if arguments.books is None and not arguments.quick:
        parser.error("name a folder of books with --books, or show with --quick that it runs")
    model, tokenizer = load(arguments.model or real_model.fetch(), dtype="float32", language=True)
    model.to(getattr(torch, arguments.dtype))  # once a file's packed weights are plain numbers
    texts = [demo.text() * 2] if arguments.books is None else list(read_books(arguments.books))
    books = [tokenizer.encode(one, add_special_tokens=False, verbose=False) for one in texts]
    plan = QUICK if arguments.quick else FULL
    encode = partial(tokenizer.encode, add_special_tokens=False)
    samples = [text(books, encode, CALIBRATION, plan.sample, 1000 + number).with_answers for number in range(4)]
    with (
        torch.inference_mode(),
        TemporaryDirectory() as folder,
        Report("cache_real", arguments.save, width=200) as report,
    ):
        kept = arguments.results or Path(folder if arguments.quick else "run") / "cache_real.jsonl"
        origin = f"{arguments.model or 'SmolLM2-135M-Instruct'}, {arguments.dtype}, {arguments.books}"
        bench = Bench(Reader(model, tokenizer, samples), books, plan, Results(kept), origin)
        alone = only(families(bench.reader) | families_whole(), arguments.only)
        searched = bench.searched(alone)
        around = only(families_around(best(searched, families(bench.reader))), arguments.only)
        every = alone | around
        searched |= bench.searched(around)
        found = bench.measured({"full cache": ALL} | every, {"full cache": {}} | best(searched, every))
        if searched:
            report.show(search_table(searched, every, plan))
        beside = {} if arguments.kvpress is None else bench.pressed(kvpress(arguments, model, tokenizer, folder))
        measured = found | {plan.shortest: found[plan.shortest] | beside}
        report.show(table_of(measured, plan), best_table(found, plan))
    if arguments.plot:
        plot(found, plan).write_html(arguments.plot)


def kvpress(arguments: Namespace, model: Any, tokenizer: Any, folder: str) -> OtherInterpreter:
    """An interpreter that has kvpress, and the model from a folder."""
    config = copy(model.config)
    config.__dict__.pop("quantization_config", None)  # of the file that plain weights came from
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    threads = str(torch.get_num_threads())
    return OtherInterpreter(arguments.kvpress, "bench.presses_real", folder, arguments.dtype, threads)


def only(of: Mapping[str, Family], names: Sequence[str] | None) -> dict[str, Family]:
    """Those of these names, or all."""
    return {name: family for name, family in of.items() if names is None or name in names}


if __name__ == "__main__":
    main()
