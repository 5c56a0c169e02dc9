"""What compressing the cache of a pretrained language model gains and loses: every policy that chooses among text.

    python -m bench.cache_real --books FOLDER [--kvpress PYTHON] [--plot FILE] [--save]    2 hours on one core
    python -m bench.cache_real --quick                                                     shows that it runs

In passages of books facts are hidden: one needle, and several of one kind. Each text is read once, and every policy
compresses it at every budget: before it is known what will be asked, and with one question read too. An answer counts if
each of its tokens is the model's first choice, so that greedy decoding writes it. From the same caches: the likelihood of
how the book goes on, and how much of what the model writes by itself with the full cache is written still. Policies choose
once, after the prompt. Their settings are searched on one half of the material, and all figures are of the other. A run
that was interrupted goes on.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from training.tokenizer import books as read_books

from bench import real_model
from bench.cache_case import Case, Measures, goes_by_questions, reads_in_steps
from bench.cache_families import Family, Reader, Settings, families, families_around, families_whole
from bench.cache_figures import Found, Row, best_table, plot, search_table, table_of
from bench.cache_plan import LONG, QUICK, Plan
from bench.cache_texts import CALIBRATION, REPORT, Half, text
from bench.other_interpreter import OtherInterpreter
from bench.results import Report, command_line
from bench.small_models import Results
from regard import demo
from regard.cache import KVzip, Policy
from regard.models import load

CALIBRATION_FACTS = 4
PRESSES = (
    "Knorm", "SnapKV", "SnapKV, by head", "ExpectedAttention", "KVzip", "TOVA", "StreamingLLM", "observed attention"
)  # fmt: skip


class Bench:
    """Everything that is measured, as far as it is not among the results."""

    def __init__(self, reader: Reader, books: list[list[int]], plan: Plan, results: Results, origin: str) -> None:
        self.reader, self.books, self.plan, self.results = reader, books, plan, results
        self.origin = origin  # of model and books: results of others are not taken for theirs

    def case(self, half: Half, length: int, number: int) -> Case:
        """One text of a half."""
        encode = partial(self.reader.tokenizer.encode, add_special_tokens=False)
        facts = self.plan.facts if half is REPORT else CALIBRATION_FACTS
        is_timed = half is REPORT and number == 0 and length == self.plan.longest
        return Case(self.reader.model, text(self.books, encode, half, length, number, facts), is_timed)

    def searched(self, of: Mapping[str, Family]) -> dict[str, dict[str, float]]:
        """The share of answers that are right by a policy's name and its settings, questions later and before alike."""
        rights: dict[str, dict[str, list[float]]] = {}
        for number in range(self.plan.calibrated):
            case = self.case(CALIBRATION, self.plan.shortest, number)
            for name, family in of.items():
                for settings in family.settings if len(family.settings) > 1 else ():
                    key = f"{self.origin}, search, text {number}, {name}, {settings}"
                    right = self.results.one(
                        key, partial(self._right, case, partial(family.make, budget=self.plan.searched, **settings))
                    )
                    rights.setdefault(name, {}).setdefault(str(settings), []).append(right)
        return {name: {which: statistics.mean(one) for which, one in own.items()} for name, own in rights.items()}

    def _right(self, case: Case, make: Callable[[], Policy]) -> float:
        policy = make()
        later = statistics.mean(case.right_later(policy))
        if isinstance(policy, KVzip):  # which would repeat the text for each question
            return later
        return (later + statistics.mean(case.right_before(policy, case.text.questions[: self.plan.asked_before]))) / 2

    def measured(self, of: Mapping[str, Family], chosen: Mapping[str, Settings]) -> Found:
        """What each policy keeps of the texts of the other half."""
        found: Found = {}
        texts = [(length, number) for length, texts in self.plan.lengths.items() for number in range(texts)]
        with Progress(transient=True) as bar:
            for length, number in bar.track(texts, description="texts"):
                case = self.case(REPORT, length, number)
                for name, family in bar.track(of.items(), description=f"{length:,} tokens, text {number}"):
                    for budget in self.plan.budgets_of(family, length):
                        key = f"{self.origin}, {length} tokens, text {number}, {name}, {budget}, {chosen[name]}"
                        make = partial(family.make, budget=budget, **chosen[name])
                        measures = self.results.one(key, partial(self._measures, case, make))
                        if measures:
                            found.setdefault(length, {}).setdefault((name, budget), []).append(measures)
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
        if shortest and goes_by_questions(policy):
            measures["before"] = case.right_before(policy, case.text.questions[: self.plan.asked_before])
        return measures


def best(searched: Mapping[str, Mapping[str, float]], of: Mapping[str, Family]) -> dict[str, Settings]:
    """Of each family the settings of the highest share; of equal ones those that come first."""
    chosen = {}
    for name, family in of.items():
        shares = searched.get(name, {})
        chosen[name] = max(family.settings, key=lambda settings: shares.get(str(settings), 0.0))
    return chosen


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
    plan = QUICK if arguments.quick else LONG
    encode = partial(tokenizer.encode, add_special_tokens=False)
    samples = [
        text(books, encode, CALIBRATION, plan.sample, 1000 + number, CALIBRATION_FACTS).with_answers
        for number in range(4)
    ]
    with (
        torch.inference_mode(),
        TemporaryDirectory() as folder,
        Report("cache_real", arguments.save, width=200) as report,
    ):
        kept = arguments.results or Path(folder if arguments.quick else "run") / "cache_real.jsonl"
        origin = f"{arguments.model or 'SmolLM2-135M-Instruct'}, {arguments.dtype}, {arguments.books}"
        bench = Bench(Reader(model, tokenizer, samples), books, plan, Results(kept), origin)
        alone = only(families_whole() | families(bench.reader), arguments.only)
        searched = bench.searched(alone)
        around = only(families_around(best(searched, families(bench.reader))), arguments.only)
        every = alone | around
        searched |= bench.searched(around)
        found = bench.measured(every, best(searched, every))
        if searched:
            report.show(search_table(searched, every, plan))
        beside = {} if arguments.kvpress is None else bench.pressed(kvpress(arguments, model, tokenizer, folder))
        measured = found | {plan.shortest: found[plan.shortest] | beside}
        report.show(table_of(measured, plan), best_table(found, plan))
    if arguments.plot:
        plot(found, plan).write_html(arguments.plot, config={"displayModeBar": False})


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
