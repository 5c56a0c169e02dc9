"""The methods that `bench.steering_real` compares, each calibrated by its own search, and what they do to a chat model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regard
from bench.real_tasks import TASKS, Case, Prompts, Task, in_book
from regard.steer import Edit
from regard.steer.language import (
    Example,
    FocusDirections,
    JuiceHeads,
    OverTrustPenalty,
    SoftInjection,
    act,
    answer_probability,
    best_heads,
    calibrate_juice,
    calibrate_zero_tuning,
    context_share,
    find_act_heads,
    find_juice_heads,
    learn_focus_directions,
    learn_soft_injection,
    pasta,
    run_twice,
    score_pasta_heads,
    steer_to_context,
    task_embedding,
)
from regard.steer.language.example import batch_logits
from regard.steer.language.heads import Head
from regard.tokens import resolve

SEARCHED = 8  # examples that a search over all heads reads, of one length
Measured = Callable[["Steered", Task, Sequence[Case]], np.ndarray]
"""What each case is worth with a method; for choices the answer's probability."""


def spans(batch: Sequence[Example]) -> Tensor:
    """(batch, tokens) boolean: the passages that matter."""
    return torch.cat([resolve(example.highlighted, 0, len(example)) for example in batch])


@dataclass(frozen=True)
class Steered:
    """A method that is ready: its edits for a batch of texts of one length, and how they are applied."""

    setting: str

    def edits(self, batch: Sequence[Example]) -> Sequence[Edit]:
        """None, plainly."""
        return ()

    def read(self, case: Case) -> Example:
        """What of a case the model reads."""
        return case.example

    def next_logits(self, model: Any, batch: Sequence[Example]) -> Tensor:
        """(batch, vocabulary)."""
        edits = self.edits(batch)
        with regard.steer(model, *edits) if edits else nullcontext():
            return batch_logits(model, [example.token_ids for example in batch])

    def write(self, model: Any, batch: Sequence[Example], tokens: int) -> Tensor:
        """(batch, tokens): what is written after each, greedily."""
        ids = torch.tensor([list(example.token_ids) for example in batch])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        edits = self.edits(batch)
        with regard.steer(model, *edits) if edits else nullcontext():
            written: Tensor = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, **self.options(model, inputs)
            )
        return written[:, ids.shape[1] :]

    def options(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """More for ``generate``."""
        return {}


@dataclass(frozen=True)
class Highlighted(Steered):
    """Reweight or Redistribute, on every head."""

    kind: str
    by: float

    def edits(self, batch: Sequence[Example]) -> Sequence[Edit]:
        if self.kind == "Reweight":
            return [regard.Reweight(spans(batch), self.by)]
        return [regard.Redistribute(source=0, target=spans(batch), share=self.by)]


@dataclass(frozen=True)
class Always(Steered):
    """Edits that do not depend on the text."""

    made: Sequence[Edit]

    def edits(self, batch: Sequence[Example]) -> Sequence[Edit]:
        return self.made


@dataclass(frozen=True)
class RestOfPrompt(Steered):
    """PASTA, and steering to the user's context: all but the passage loses weight, on chosen heads."""

    edit: Callable[..., Edit]
    alpha: float
    heads: Sequence[Head] | None = None

    def edits(self, batch: Sequence[Example]) -> Sequence[Edit]:
        return [self.edit(spans(batch), len(batch[0]), self.alpha, self.heads)]


@dataclass(frozen=True)
class Twice(Always):
    """JUICE: the second of two runs."""

    def next_logits(self, model: Any, batch: Sequence[Example]) -> Tensor:
        ids = torch.tensor([list(example.token_ids) for example in batch])
        return run_twice(model, self.made, input_ids=ids, logits_to_keep=1)[:, -1]


@dataclass(frozen=True)
class Injected(Steered):
    """Soft Injection: the demonstrations are left out."""

    injection: SoftInjection

    def read(self, case: Case) -> Example:
        return case.bare or case.example

    def edits(self, batch: Sequence[Example]) -> Sequence[Edit]:
        return self.injection.edits(len(batch[0]))


@dataclass(frozen=True)
class Penalised(Steered):
    """OPERA's penalty, without going back."""

    def options(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"logits_processor": [OverTrustPenalty(model, inputs)]}


@dataclass(frozen=True)
class Bench:
    """What a calibration works with: the model, the questions' maker, how much of it, and what was found once for several."""

    model: Any
    prompts: Prompts
    measured: Measured
    remembered: Callable[[str, Callable[[], Any]], Any]
    cases: Callable[[Task], list[Case]]
    length: int

    def best(self, task: Task, tried: Sequence[Steered]) -> Steered:
        """The one with which calibration cases are worth most."""
        cases = self.cases(task)
        return max(tried, key=lambda steered: float(self.measured(steered, task, cases).mean()))

    def few(self, task: Task, number: int = SEARCHED) -> list[Example]:
        """Calibration examples of the commonest lengths, which a search reads as one batch where it can."""
        examples = [case.example for case in task.cases(self.prompts, "calibration", 10 * number)]
        often = Counter(map(len, examples))
        return sorted(examples, key=lambda example: (-often[len(example)], len(example)))[:number]

    def heads(self) -> list[Head]:
        """Those that a search tries: of every second layer, but for the first and the last, as ACT leaves them out."""
        config = self.model.config
        layers = range(2, config.num_hidden_layers - 1, 2)
        return [(layer, head) for layer in layers for head in range(config.num_attention_heads)]


def reweight(bench: Bench, task: Task) -> Steered:
    return bench.best(task, [Highlighted(f"× {by}", "Reweight", by) for by in (3, 20)])


def redistribute(bench: Bench, task: Task) -> Steered:
    return bench.best(task, [Highlighted(f"{by:.0%} of the sink", "Redistribute", by) for by in (0.2, 0.6)])


def temperature(bench: Bench, task: Task) -> Steered:
    return bench.best(task, [Always(f"τ = {by}", [regard.Temperature(by)]) for by in (0.8, 1.2)])


def pasta_heads(bench: Bench, task: Task) -> dict[Head, float]:
    return score_pasta_heads(bench.model, bench.few(task), measure=answer_probability, heads=bench.heads())


def tell_where(bench: Bench, task: Task) -> Steered:
    """PASTA, with heads profiled on one task that instructs and one that states a fact."""
    profiled = TASKS["language" if task.name in ("JSON", "language", "length") else "capitals"]
    scores = bench.remembered(f"PASTA's heads, {profiled.name}", partial(pasta_heads, bench, profiled))
    tried = [RestOfPrompt(f"{top} heads", pasta, 0.01, best_heads(scores, top=top)) for top in (8, 32)]
    return bench.best(task, tried)


def zero_tuning(bench: Bench, task: Task) -> Steered:
    examples = [case.example for case in bench.cases(task)]
    found = calibrate_zero_tuning(bench.model, examples, answer_probability)
    heads = len({head for _, head in found.profile.dominant})
    return Always(f"γ = {found.by:g}, {heads} heads a layer", [found.edit] if found.by != 1 else [])


def calibrate_sinks(bench: Bench, task: Task) -> Steered:
    heads = find_act_heads(bench.model, bench.few(task), measure=answer_probability, heads=bench.heads())
    return Always(f"{len(heads)} heads", act(heads) if heads else ())


def context_heads(bench: Bench, task: Task) -> Steered:
    heads = best_heads(context_share(bench.model, bench.few(task)), top=20)
    return bench.best(
        task,
        [
            RestOfPrompt("α = 0.9, all heads", steer_to_context, 0.9),
            RestOfPrompt("α = 0.5, 20 heads", steer_to_context, 0.5, heads),
        ],
    )


def directions(bench: Bench) -> tuple[FocusDirections, list[Head]]:
    """Learned on texts of a quarter of the length, for what is learned does not depend on it."""
    examples = [case.example for case in in_book("facts", bench.length // 4).cases(bench.prompts, "calibration", 60)]
    heads = best_heads(context_share(bench.model, examples[:12]), top=20)
    return learn_focus_directions(bench.model, examples, epochs=2, learning_rate=5e-3), heads


def focus(bench: Bench, task: Task) -> Steered:
    learned, heads = bench.remembered("focus directions", partial(directions, bench))
    return bench.best(task, [Always(f"α = {by}, 20 heads", learned.edits(by, heads)) for by in (0.2, 1.0)])


def just_run_twice(bench: Bench, task: Task) -> Steered:
    """JUICE, with one factor of those that the paper tries for each head, the middle ones."""
    sets = {"in a text": bench.few(task, 4), "alone": bench.few(TASKS[f"{task.name}, stated alone"], 4)}
    heads: JuiceHeads = find_juice_heads(bench.model, sets, enlarge=(3.0,), suppress=(-2.0,), heads=bench.heads())
    made = calibrate_juice(bench.model, bench.few(task, 16), heads, up=(0, 1, 2, 4), down=(0, 1, 2))
    strengths = ", ".join(f"{edit.by:+g}" for edit in made) or "none"
    return Twice(f"α {strengths}, {len(heads.enlarge)} and {len(heads.suppress)} heads", made)


def inject(bench: Bench, task: Task) -> Steered:
    cases = task.cases(bench.prompts, "calibration", 100)
    bare = [case.bare for case in cases if case.bare is not None]
    embedding = task_embedding(bench.model, [case.example.token_ids for case in cases[:50]])
    found = learn_soft_injection(bench.model, bare[:80], embedding, bare[80:], steps=100)
    return Injected("no demonstrations", found)


def over_trust(bench: Bench, task: Task) -> Steered:
    return Penalised("penalty only")


@dataclass(frozen=True)
class Method:
    """A method, the tasks that it is for, and what its paper claims of them."""

    name: str
    calibrate: Callable[[Bench, Task], Steered]
    tasks: tuple[str, ...]
    claim: str


_STATED = ("JSON", "language", "length", "capitals", "years", "needle", "facts")
METHODS = {
    method.name: method
    for method in (
        Method("Reweight", reweight, _STATED, ""),
        Method("Redistribute", redistribute, _STATED[1:], ""),
        Method(
            "Temperature", temperature, ("language", "capitals", "choice", "swapped", "facts", "writing"), ""
        ),
        Method(
            "PASTA", tell_where, ("JSON", "language", "length", "capitals", "years"),
            "+22% on average over instructions and changed facts (LLaMA-7B)",
        ),
        Method(
            "ZeroTuning", zero_tuning, ("choice", "swapped"),
            "+11.7% on classification, +2.6% on questions (Llama-3.1-8B)",
        ),
        Method("ACT", calibrate_sinks, ("choice", "swapped"), "up to +7.3% on average (Llama-30B)"),
        Method(
            "Context heads", context_heads, ("capitals", "years", "needle", "facts"),
            "what a chat template takes from the context, steering gives back",
        ),
        Method("Focus directions", focus, ("needle", "facts"), "fewer distractions in long contexts"),
        Method(
            "JUICE", just_run_twice, ("capitals", "memory"), "to context or to memory, the best on 11 datasets (6 models)"
        ),
        Method(
            "Soft Injection", inject, ("swapped", "opposites"),
            "10.2 to 14.3% above 10 demonstrations (57 tasks, 4B to 70B)",
        ),
        Method("OPERA", over_trust, ("writing",), "fewer hallucinations of models that see; nothing of repetition"),
    )
}  # fmt: skip
