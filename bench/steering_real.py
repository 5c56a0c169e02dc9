"""Does steering help a real pretrained chat model? Every language method on the tasks that its paper has, with intervals.

    python -m bench.steering_real [--quick] [--only METHOD[/TASK] ...] [--fewer TASK=NUMBER ...] [--books FOLDER]
                                  [--lengths 1024 ...] [--dtype bfloat16] [--save]

SmolLM2-135M-Instruct, prompts in its own chat template, tasks of `bench.real_tasks`. Each method is calibrated on one half of
the templates, names, facts and words, by the search that regard has for it, and measured on the other half. Prints one table:
plain and steered, the paired difference with the interval of 10,000 resamplings of what was asked about, and a verdict at 5%
after Holm over the whole table. What was computed is kept in ``run/``, and a run that was interrupted goes on.
"""

from __future__ import annotations

import copy
import pickle
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import real_model
from bench.real_methods import METHODS, Bench, Method, Steered
from bench.real_tasks import TASKS, Case, Prompts, Task, in_book
from bench.results import Report, command_line
from regard import demo
from regard.models import load
from regard.steer.language import accuracy, answer_probability
from regard.steer.language.example import batches

LONG = ("needle", "facts")
QUICK = (
    "Reweight/capitals",
    "Redistribute/language",
    "Temperature/choice",
    "Context heads/years",
)
CHUNK = 100  # cases that are measured, and kept, at a time
RESAMPLINGS = 10_000


class Kept:
    """What was computed, one file each; what is there is not computed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.pickle"
        if not path.exists():
            began = time.monotonic()
            made = make()
            path.with_suffix(".part").write_bytes(pickle.dumps(made))
            path.with_suffix(".part").rename(path)  # at once, so that what is there is whole
            Console(stderr=True).print(f"{name}: {time.monotonic() - began:.0f} s", highlight=False)
        return pickle.loads(path.read_bytes())


def model_of(path: Path, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer; in half precision all but the logits, which would tie."""
    model, tokenizer = load(path, language=True)
    head = copy.deepcopy(model.lm_head)
    model = model.to(getattr(torch, dtype))
    model.lm_head = head
    head.register_forward_pre_hook(lambda module, given: (given[0].float(),))
    return model, tokenizer


def measured(
    model: Any, tokenizer: Any, steered: Steered, task: Task, cases: Sequence[Case], probability: bool = False
) -> np.ndarray:
    """What each case is worth: the score of what is written, or whether the answer is chosen, or its probability."""
    examples = [steered.read(case) for case in cases]
    worth: dict[int, float] = {}
    with torch.inference_mode():
        for batch in batches(examples):
            if task.score:
                written = steered.write(model, batch, task.new_tokens)
                found = map(task.score, tokenizer.batch_decode(written, skip_special_tokens=True))
            else:
                found = map(answer_probability if probability else accuracy, steered.next_logits(model, batch), batch)
            worth |= zip(map(id, batch), found, strict=True)
    return np.array([worth[id(example)] for example in examples])


def resampled(differences: np.ndarray, groups: Sequence[str], times: int = RESAMPLINGS) -> np.ndarray:
    """The mean difference in so many samples of as many groups, drawn with replacement; a group stays together."""
    names, which = np.unique(np.array(groups), return_inverse=True)
    sums, sizes = np.bincount(which, differences), np.bincount(which)
    drawn = np.random.default_rng(0).integers(0, len(names), (times, len(names)))
    means: np.ndarray = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def p_value(means: np.ndarray) -> float:
    """Two-sided, of no difference: how often the resampled mean has not the sign that it has most often."""
    return float(min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + len(means))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that with all below 5% no more than 5% of tables have one that is there by chance (S. Holm, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def verdict(difference: float, adjusted: float) -> str:
    if adjusted >= 0.05:
        return "nothing"
    return "helps" if difference > 0 else "hurts"


class Comparison:
    """One method on one task, beside the plain model."""

    def __init__(
        self, method: str, task: str, setting: str, plain: np.ndarray, steered: np.ndarray, groups: Sequence[str]
    ):
        self.method, self.task, self.setting = method, task, setting
        self.plain, self.steered = float(plain.mean()), float(steered.mean())
        self.number, self.groups = len(plain), len(set(groups))
        self.difference = float((steered - plain).mean())
        means = resampled(steered - plain, groups)
        self.low, self.high = np.percentile(means, [2.5, 97.5])
        self.p = p_value(means)


class Run:
    """The comparisons, as they are computed."""

    def __init__(
        self, model: Any, tokenizer: Any, prompts: Prompts, kept: Kept, calibrate: int, samples: int,
        fewer: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.prompts, self.kept = model, tokenizer, prompts, kept
        self.calibrate, self.samples, self.fewer = calibrate, samples, fewer or {}

    def bench(self, task: Task) -> Bench:
        """What a calibration for this task works with."""
        worth = partial(measured, self.model, self.tokenizer, probability=True)
        return Bench(self.model, self.prompts, worth, self.kept, self.calibration, task.length)

    def calibration(self, task: Task) -> list[Case]:
        """Fewer where they are slow."""
        return task.cases(self.prompts, "calibration", self.calibrate // (3 if task.slow else 1))

    def scores(self, name: str, steered: Steered, task: Task, cases: Sequence[Case]) -> np.ndarray:
        """Measured by the chunk."""
        found = []
        for start in range(0, len(cases), CHUNK):
            chunk = cases[start : start + CHUNK]
            make = partial(measured, self.model, self.tokenizer, steered, task, chunk)
            found.append(self.kept(f"{name} on {task.name}, {start} to {start + len(chunk)}", make))
        return np.concatenate(found)

    def compare(self, method: Method, task: Task) -> Comparison:
        samples = min(self.samples, self.fewer.get(task.name.split(",")[0], self.samples))
        cases = task.cases(self.prompts, "measured", samples)
        plain = self.scores("plain", Steered("as it is"), task, cases)
        steered = self.kept(f"{method.name} for {task.name}", lambda: method.calibrate(self.bench(task), task))
        scores = self.scores(method.name, steered, task, cases)
        return Comparison(method.name, task.name, steered.setting, plain, scores, [case.group for case in cases])


def wanted(only: Sequence[str], lengths: Sequence[int]) -> list[tuple[Method, Task]]:
    """The comparisons that are named METHOD or METHOD/TASK, short texts first; all where none is.

    Raises:
        ValueError: a name that is none of them.
    """
    found = [
        (method, name, task)
        for method in METHODS.values()
        for name in method.tasks
        for task in ([in_book(name, length) for length in lengths] if name in LONG else [TASKS[name]])
    ]
    known = {text for method, name, _ in found for text in (method.name, f"{method.name}/{name}")}
    if unknown := set(only) - known:
        raise ValueError(f"{sorted(unknown)} are no comparisons; known are {sorted(known)}")
    chosen = [(m, task) for m, name, task in found if not only or {m.name, f"{m.name}/{name}"} & set(only)]
    return sorted(chosen, key=lambda pair: pair[1].length)


def show(comparisons: Sequence[Comparison], title: str) -> list[Table]:
    """Every comparison with its verdict, and what each paper claims beside how often its method helped."""
    adjusted = holm([found.p for found in comparisons])
    verdicts = [verdict(found.difference, p) for found, p in zip(comparisons, adjusted, strict=True)]
    table = Table(
        "method, task", "setting", "examples", "plain", "steered", "difference, 95%", "p, Holm", "verdict", title=title
    )
    for found, p, said in zip(comparisons, adjusted, verdicts, strict=True):
        table.add_row(
            f"{found.method}, {found.task}", found.setting, f"{found.number} of {found.groups}",
            f"{found.plain:.3f}", f"{found.steered:.3f}",
            f"{found.difference:+.3f} ({found.low:+.3f} … {found.high:+.3f})", f"{p:.3f}", said,
        )  # fmt: skip
    claims = Table("method", "its paper", "here", title="What is claimed")
    for name in dict.fromkeys(found.method for found in comparisons):
        own = [said for found, said in zip(comparisons, verdicts, strict=True) if found.method == name]
        counts = ", ".join(f"{said} {own.count(said)}" for said in ("helps", "hurts", "nothing") if said in own)
        claims.add_row(name, METHODS[name].claim or "–", f"{counts} of {len(own)}")
    return [table, claims]


def book_text(folder: Path | None) -> str:
    """All books of a folder; by default the chapter that ships."""
    if folder is None:
        return demo.text()
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()) if path.is_file())


def of_task(given: str) -> tuple[str, int]:
    """A task's name and a number."""
    name, number = given.split("=")
    if name not in {known for method in METHODS.values() for known in method.tasks}:
        raise ValueError(f"{name!r} is no task")
    return name, int(number)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", type=Path, help="a chat model; by default SmolLM2-135M-Instruct, which is fetched")
    parser.add_argument(
        "--books", type=Path, help="folder of books; by default the chapter that ships, again and again"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[1024], help="of texts with needles and facts, in tokens"
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument(
        "--fewer", type=of_task, nargs="*", default=[], metavar="TASK=NUMBER", help="samples of tasks that take long"
    )
    parser.add_argument("--calibrate", type=int, default=60)
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the processor multiplies it faster")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD[/TASK]")
    parser.add_argument("--kept", type=Path, default=Path("run/steering_real"), help="folder of what was computed")
    parser.add_argument("--quick", action="store_true", help="four comparisons of 24 examples: shows that it runs")
    arguments = parser.parse_args()
    samples, calibrate = (24, 12) if arguments.quick else (arguments.samples, arguments.calibrate)
    try:
        chosen = wanted(QUICK if arguments.quick and not arguments.only else arguments.only, arguments.lengths)
    except ValueError as error:
        parser.error(str(error))
    path = arguments.model or real_model.fetch()
    called = f"{path}, {arguments.dtype}, {arguments.books}, {calibrate}"
    kept = Kept(arguments.kept / f"{zlib.crc32(called.encode()):08x}")
    model, tokenizer = model_of(path, arguments.dtype)
    prompts = Prompts(tokenizer, book_text(arguments.books))
    run = Run(model, tokenizer, prompts, kept, calibrate, samples, dict(arguments.fewer))
    comparisons = [run.compare(method, task) for method, task in track(chosen, "comparing")]
    title = f"{path.stem}, {arguments.dtype}; helps or hurts at 5% after Holm over {len(comparisons)} comparisons"
    with Report("steering_real", arguments.save, width=180) as report:
        report.show(*show(comparisons, title))


if __name__ == "__main__":
    main()
