"""What it costs to compress a cache, what it gains, and what is lost by it.

    python -m bench.cache [--quick] [--kvpress PYTHON] [--save]        time and memory, on a Llama of 8 layers
    python -m bench.cache --facts [--held-out BOOKS] [--samples 200]   facts recalled against the budget, on the bundled model
    python -m bench.cache --facts --later                              the same, asked for after the context was compressed

The first prints one table: the time of reading a prompt and tokens per second of decoding with a quarter of the cache, as
ratios to the model alone, and memory; beside kvpress's presses where --kvpress names an interpreter that has them (in an
environment of its own: it wants an older transformers). The second prints one table of exact-match answers, with Wilson's 95%
intervals, and draws it (--plot FILE).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from training.evaluate import DIGITS, FactRow, fact_row, proportion
from training.tasks import Material
from transformers import DynamicCache

import regard
from bench.held_out import held_out_books
from bench.measuring import Run, allocated
from bench.other_interpreter import OtherInterpreter
from bench.presses import Cost, cost, llama, tokens
from bench.results import Report, command_line
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    ExpectedAttention,
    Knorm,
    KVzip,
    ObservedAttention,
    Policy,
    Pyramid,
    Random,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
    ThinK,
)
from regard.cache.narrow_group import NarrowGroup

Recall = dict[
    str, dict[float, tuple[float, float, float]]
]  # exact match and its interval, by policy and budgetLENGTHS = (512, 1024, 2048, 4096, 8192)
BUDGETS = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)
LENGTHS = (512, 1024, 2048, 4096, 8192)
QUESTION = 16  # last tokens of a text, the question among them
LENGTH, DISTRACTORS, BATCH, SEED = 512, 4, 8, 11


def timed_policies(tokenizer: Any) -> dict[str, Policy]:
    """Each with a quarter of the entries, chosen after the prompt, as presses do; names are those of `bench.presses`."""
    return {
        "Knorm": Knorm(budget=0.25),
        "SnapKV": SnapKV(budget=0.25),
        "SnapKV, by head": SnapKV(budget=Adaptive(0.25)),
        "ExpectedAttention": ExpectedAttention(budget=0.25),
        "KVzip": KVzip(tokenizer, budget=0.25),
        "TOVA": TOVA(budget=0.25, when=AfterPrompt()),
        "StreamingLLM": StreamingLLM(budget=0.25, when=AfterPrompt()),
        "observed attention": ObservedAttention(budget=0.25, recent=0.0, when=AfterPrompt()),
        "SnapKV, ThinK": ThinK(SnapKV(budget=0.25), channels=0.5),
        "TOVA, each step": TOVA(budget=0.25),
        "observed attention, each step": ObservedAttention(budget=0.25),
    }


def block(model: Module, policy: Policy | None) -> AbstractContextManager[object]:
    return nullcontext() if policy is None else regard.compress(model, policy)


def own_cost(model: Any, policy: Policy | None, length: int, device: str) -> Cost:
    """Steps are inside the block, except after a policy that drops when it is left."""
    inside = not isinstance(policy, KVzip)
    return cost(model, tokens(length, device), device, partial(block, model, policy), _held, steps_inside=inside)


def decoding_memory(model: Any, ids: Tensor, policy: Policy | None) -> int:
    """Bytes that 40 steps of decoding hold at their peak, the cache included."""

    def read_text() -> Run:
        with block(model, policy if isinstance(policy, KVzip) else None):
            cache = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values

        def decode() -> None:
            for _ in range(40):
                model(ids[:, :1], past_key_values=cache)

        return decode

    with torch.inference_mode(), block(model, None if isinstance(policy, KVzip) else policy):
        return allocated(read_text)


def _held(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    groups = getattr(layer, "groups", [layer])
    tensors = [tensor for group in groups for tensor in (group.keys, group.values)]
    return tensors + [group.narrow for group in groups if isinstance(group, NarrowGroup)]


def time_table(lengths: Sequence[int], device: str, rounds: int, presses: OtherInterpreter | None) -> Table:
    """Reading and decoding with each policy, as ratios to the model alone in the same process and round."""
    _, tokenizer = regard.mini()
    tokenizer.model_max_length = 32768  # as the model's
    model, policies = llama(device), timed_policies(tokenizer)
    theirs = [] if presses is None else [name for name in policies if "each step" not in name]
    title = "a quarter of the entries: ratios to the model alone" + (f"; beside {presses.versions}" if presses else "")
    sides = ("", ", kvpress") if presses else ("",)
    columns = [f"{what}{side}" for what in ("reading, ×", "tokens/s, ×", "cache, MB") for side in sides]
    table = Table("tokens", "policy", *columns, "peak, MB", title=title)
    for length in lengths:
        found: dict[tuple[str, str], list[Cost]] = {}
        for round_ in range(rounds + 1):  # the first warms up
            for name, policy in ({"": None} | policies).items():
                of = {"": own_cost(model, policy, length, device)}
                if presses is not None and name in ["", *theirs]:
                    of[", kvpress"] = Cost(**presses.ask(name=name, length=length))
                for side, one in of.items():
                    found.setdefault((name, side), []).extend([one] if round_ else [])
        for name, policy in ({"": None} | policies).items():
            cells = _cells(found, name, sides)
            peak = decoding_memory(model, tokens(length, device), policy)
            table.add_row(
                f"{length:,}",
                name or "the model alone",
                *cells,
                f"{peak / 1e6:.0f}",
                end_section=name == list(policies)[-1],
            )
    return table


def _cells(found: dict[tuple[str, str], list[Cost]], name: str, sides: Sequence[str]) -> list[str]:
    """What reading and a step take, the median over the rounds, and what is held, side by side."""
    cells = []
    for what in ("reading", "step", "held"):
        for side in sides:
            own, alone = found.get((name, side)), found["", side]
            if own is None:
                cells.append("")
            elif what == "held":
                cells.append(f"{own[0].held / 1e6:.1f}")
            elif not name:
                median = statistics.median(getattr(one, what) for one in alone)
                cells.append(f"{median:.2f} s" if what == "reading" else f"{1 / median:.1f}/s")
            else:
                pairs = zip(own, alone, strict=True)
                ratios = [getattr(one, what) / getattr(other, what) for one, other in pairs]
                median = statistics.median(ratios)
                cells.append(f"{median if what == 'reading' else 1 / median:.2f}×")
    return cells


# --- facts -----------------------------------------------------------------------------------------------------------------


def policies(model: Module, budget: float, samples: list[Tensor]) -> dict[str, Policy]:
    """Every policy that drops text, at a budget, with windows that the smallest one has room for."""
    return {
        "retrieval heads": retrieval_heads(model, budget, samples),
        "SnapKV, kernel 9": SnapKV(budget=budget, window=16, kernel=9),
        "SnapKV": SnapKV(budget=budget, window=16),
        "SnapKV, by head": SnapKV(budget=Adaptive(budget), window=16),
        "SnapKV, pyramid": SnapKV(budget=Pyramid(budget), window=16),
        "Task-KV": TaskKV(budget=budget, sinks=4, recent=16, window=16),
        "observed attention": ObservedAttention(budget=budget),
        "ExpectedAttention": ExpectedAttention(budget=budget),
        "TOVA": TOVA(budget=budget),
        "StreamingLLM": StreamingLLM(budget=budget),
        "Knorm": Knorm(budget=budget),
        "random": Random(budget=budget),
    }


def retrieval_heads(model: Module, budget: float, samples: list[Tensor]) -> Policy:
    """Three quarters of the budget for heads that keep all, as far as it reaches, and the rest shared by the others."""
    if budget == 1:
        return RetrievalHeads(budget=budget, heads={})
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    full = int(0.75 * budget * heads)
    rest = (budget * heads - full) / (heads - full)
    found = RetrievalHeads.profile(model, samples, share=full / heads) if full else {}
    return RetrievalHeads(budget=rest, heads=found)


def policies_before(tokenizer: Any, budget: float) -> dict[str, Policy]:
    """Policies that compress a context before it is known what will be asked."""
    return {
        "KVzip": KVzip(tokenizer, budget=budget),
        "KVzip, by layer": KVzip(tokenizer, budget=budget, across="layer"),
        "KVzip, by head": KVzip(tokenizer, budget=budget, across="head"),
        "KVzip+": KVzip(tokenizer, budget=budget, normalized=True),
        "ExpectedAttention": ExpectedAttention(budget=budget),
        "ExpectedAttention, by head": ExpectedAttention(budget=Adaptive(budget)),
        "SnapKV": SnapKV(budget=budget, window=16),
        "SnapKV, by head": SnapKV(budget=Adaptive(budget), window=16),
    }


def recalled_later(model: Any, rows: list[FactRow], policy: Policy) -> int:
    """How many answers are written out right, where the question comes after the context was compressed."""
    hits = 0
    for start in range(0, len(rows), BATCH):
        ids = torch.from_numpy(np.stack([row.ids for row in rows[start : start + BATCH]]))
        prompt, answer = ids[:, :-DIGITS], ids[:, -DIGITS:]
        with torch.inference_mode(), regard.compress(model, policy):
            past = model(prompt[:, :-QUESTION]).past_key_values
        mask = torch.ones_like(prompt)
        written = model.generate(
            prompt, attention_mask=mask, past_key_values=past, max_new_tokens=DIGITS, do_sample=False
        )
        hits += int((written[:, -DIGITS:] == answer).all(dim=1).sum())
    return hits


def recalled(model: Any, rows: list[FactRow], policy: Policy) -> int:
    """How many answers are written out right, all five digits."""
    hits = 0
    for start in range(0, len(rows), BATCH):
        ids = torch.from_numpy(np.stack([row.ids for row in rows[start : start + BATCH]]))
        prompt, answer = ids[:, :-DIGITS], ids[:, -DIGITS:]
        with torch.inference_mode(), regard.compress(model, policy):
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=DIGITS, do_sample=False
            )
        hits += int((written[:, -DIGITS:] == answer).all(dim=1).sum())
    return hits


def facts(folder: Path | None, samples: int, later: bool) -> Recall:
    """Accuracy with its interval, by policy and budget; ``later``: the question comes after the context was compressed."""
    model, tokenizer = regard.mini()
    material = Material(held_out_books(folder, tokenizer), tokenizer, held_out=True)
    random = np.random.default_rng(SEED)
    rows = [fact_row(material, random, LENGTH, DISTRACTORS) for _ in range(samples)]
    profiled = [
        torch.from_numpy(fact_row(material, random, LENGTH, DISTRACTORS).ids.astype(np.int64)) for _ in range(16)
    ]
    found: Recall = {}
    with Progress(transient=True) as bar:
        task = bar.add_task("policies", total=len(BUDGETS))
        for budget in BUDGETS:
            tried = policies_before(tokenizer, budget) if later else policies(model, budget, profiled)
            for name, policy in tried.items():
                right = (recalled_later if later else recalled)(model, rows, policy)
                figure = proportion(name, right, samples)
                found.setdefault(name, {})[budget] = (figure.value, figure.low, figure.high)
                bar.update(task, description=f"{budget:.0%}, {name}")
            bar.advance(task)
    return found


def facts_table(found: Recall, samples: int, later: bool) -> Table:
    asked = "asked for after the context was compressed" if later else "asked for"
    title = f"{samples} facts {asked}, {DISTRACTORS} distractors, {LENGTH} tokens: exact match, 95% interval"
    table = Table("policy", *(f"{budget:.0%}" for budget in BUDGETS), title=title)
    for name, of in found.items():
        table.add_row(name, *(f"{value:.2f} ({low:.2f}–{high:.2f})" for value, low, high in of.values()))
    return table


def facts_plot(found: Recall, samples: int) -> go.Figure:
    """Accuracy against budget, a line for each policy, with whiskers for the intervals."""
    figure = go.Figure()
    for (name, of), colour in zip(found.items(), qualitative.Dark24, strict=False):
        values, lows, highs = (100 * np.array(column) for column in zip(*of.values(), strict=True))
        figure.add_scatter(
            x=[100 * budget for budget in of], y=values, name=name, mode="lines+markers", line={"color": colour},
            error_y={"symmetric": False, "array": highs - values, "arrayminus": values - lows, "thickness": 1},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=900, height=480, margin={"t": 60, "b": 50, "l": 60, "r": 20},
        title=f"Facts recalled with a compressed cache (bundled model, {samples} questions, {LENGTH} tokens)",
        xaxis={"title": "entries kept, % (log scale)", "type": "log", "tickvals": [100 * budget for budget in BUDGETS]},
        yaxis={"title": "answers right, %", "range": [0, 102]},
    )  # fmt: skip
    return figure


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter texts, fewer rounds and samples")
    parser.add_argument(
        "--kvpress", metavar="PYTHON", help="an interpreter that has kvpress, to measure it in the same run"
    )
    parser.add_argument("--lengths", type=int, nargs="*", help="of the texts, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--facts", action="store_true", help="recall against the budget, instead of time and memory")
    parser.add_argument("--later", action="store_true", help="facts are asked for after the context was compressed")
    parser.add_argument("--held-out", type=Path, help="folder of books; by default the chapter that ships")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="write the recall as a picture, an HTML page")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.facts:
        samples = 24 if arguments.quick else arguments.samples
        with Report("cache_later" if arguments.later else "cache_facts", arguments.save, width=150) as report:
            found = facts(arguments.held_out, samples, arguments.later)
            report.show(facts_table(found, samples, arguments.later))
        if arguments.plot:
            facts_plot(found, samples).write_html(arguments.plot)
        return
    presses = None
    if arguments.kvpress is not None:
        threads = str(torch.get_num_threads())
        presses = OtherInterpreter(arguments.kvpress, "bench.presses", str(regard.mini.path()), threads)
    with Report("cache", arguments.save, width=150) as report:
        if presses is None:
            report.console.print("kvpress is left out: --kvpress PYTHON names an interpreter that has it")
        lengths = arguments.lengths or ((512,) if arguments.quick else LENGTHS)
        report.show(time_table(lengths, device, 1 if arguments.quick else arguments.rounds, presses))


if __name__ == "__main__":
    main()
