"""Does steering help? Facts asked for among many, on the bundled model, with and without edits.

    python -m bench.steering_quality [--held-out BOOKS] [--samples 400] [--quick] [--save]

Held-out facts stand between the sentences of a text of 1,536 tokens, with so many distractors that the plain model answers
40 to 80% of the questions. Strengths and heads are chosen on rows of their own. Prints one table: exact match of all five
digits with Wilson's 95% interval, and the paired difference to no edit with the interval of 2,000 resamplings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from training.evaluate import DIGITS, FactRow, bootstrap, fact_row, proportion
from training.tasks import Material

import regard
from bench.held_out import held_out_books
from bench.results import Report, command_line
from regard.steer import Edit
from regard.steer.language import (
    Example,
    answer_probability,
    best_heads,
    calibrate_zero_tuning,
    confidence,
    pasta,
    score_pasta_heads,
)

LENGTH, BATCH, SEED = 1536, 8, 7  # half as long again as the texts that the model was trained on
DISTRACTORS = (8, 16, 24, 40)
STRENGTHS = (1.5, 2.0, 4.0, 8.0)
Edits = Callable[[Tensor], Sequence[Edit]]


def exact(model: Module, rows: Sequence[FactRow], edits: Edits) -> np.ndarray:
    """Whether all digits of each answer are the likeliest; ``edits`` makes them from the mask of the asked fact's tokens."""
    hits = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        ids = torch.from_numpy(np.stack([row.ids for row in batch]))
        stated = torch.zeros(ids.shape, dtype=torch.bool)
        for number, row in enumerate(batch):
            stated[number, row.statement] = True
        made = edits(stated)
        with torch.inference_mode(), regard.steer(model, *made) if made else nullcontext():
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -DIGITS - 1 : -1].argmax(-1)
        hits.append((likeliest == ids[:, -DIGITS:]).all(1).numpy())
    return np.concatenate(hits)


def examples(rows: Sequence[FactRow]) -> list[Example]:
    """Each row without its answer; the first digit is asked for."""
    return [Example(row.ids[:-DIGITS].tolist(), int(row.ids[-DIGITS]), highlighted=row.statement) for row in rows]


def best_strength(model: Module, rows: Sequence[FactRow], make: Callable[[float], Edits]) -> float:
    return max(STRENGTHS, key=lambda strength: exact(model, rows, make(strength)).mean())


def boost(by: float) -> Edits:
    return lambda stated: [regard.Reweight(stated, by)]


def whole_prompt(stated: Tensor, alpha: float, heads: Any = None) -> Sequence[Edit]:
    """PASTA, for a batch: the digits asked for belong to no prompt."""
    spans = stated.clone()
    spans[:, -DIGITS:] = True
    return [pasta(spans, LENGTH, alpha, heads)]


def methods(model: Module, rows: Sequence[FactRow]) -> dict[str, Edits]:
    """Every method, calibrated on these rows."""
    few = examples(rows)
    with Progress(transient=True) as bar:
        task = bar.add_task("calibrating")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        by = best_strength(model, rows, boost)
        scores = score_pasta_heads(model, few, measure=answer_probability, progress=advance)
        chosen = best_heads(scores, top=8)
        found = {"nothing": (lambda stated: []), f"highlight the fact, × {by:g}, every head": boost(by)}
        found["highlight the fact, PASTA, α = 0.01, every head"] = lambda stated: whole_prompt(stated, 0.01)
        found["highlight the fact, PASTA, α = 0.01, 8 profiled heads"] = lambda stated: whole_prompt(
            stated, 0.01, chosen
        )
        for name, measure in (("supervised", answer_probability), ("unsupervised", confidence)):
            tuned = calibrate_zero_tuning(model, few, measure, progress=advance)
            found[f"ZeroTuning, {name}, γ = {tuned.by:g}"] = lambda stated, edit=tuned.edit: [edit]
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--held-out", type=Path, help="folder of books; by default the chapter that ships")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--calibrate", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="40 samples, 8 to calibrate")
    arguments = parser.parse_args()
    samples, calibrate = (40, 8) if arguments.quick else (arguments.samples, arguments.calibrate)
    model, tokenizer = regard.mini()
    material = Material(held_out_books(arguments.held_out, tokenizer), tokenizer, held_out=True)

    def make(count: int, distractors: int, part: int) -> list[FactRow]:
        random = np.random.default_rng((SEED, part))
        return [fact_row(material, random, LENGTH, distractors) for _ in range(count)]

    plain = {number: exact(model, make(calibrate, number, 0), lambda stated: []).mean() for number in DISTRACTORS}
    distractors = min(plain, key=lambda number: abs(plain[number] - 0.6))
    rows = make(samples, distractors, 1)
    table = Table("edit", "exact match", "95% interval", "difference, 95% interval")
    table.title = f"{samples} questions, {distractors} distractors, {LENGTH:,} tokens"
    base: np.ndarray | None = None
    for name, edits in methods(model, make(calibrate, distractors, 2)).items():
        hits = exact(model, rows, edits)
        base = hits if base is None else base
        figure, change = proportion(name, int(hits.sum()), samples), bootstrap(name, hits.astype(float) - base)
        table.add_row(
            name, f"{figure.value:.3f}", f"{figure.low:.3f} … {figure.high:.3f}",
            "" if hits is base else f"{change.value:+.3f}  ({change.low:+.3f} … {change.high:+.3f})",
        )  # fmt: skip
    with Report("steering_quality", arguments.save, width=130) as report:
        report.show(table)


if __name__ == "__main__":
    main()
