"""What it costs to compress a cache, what it gains, and what is lost by it.

    python -m bench.cache [--quick] [--save]             time and memory, on a Llama of 8 layers
    python -m bench.cache --facts [--held-out BOOKS] [--samples 200]   facts recalled against the budget, on the bundled model

The first prints the time of reading a prompt with a policy as a ratio to plain, and then tokens per second and peak memory of
decoding with a quarter of the cache. The second prints one table of exact-match answers, with Wilson's 95% intervals, and
draws it (--plot FILE).
"""

from __future__ import annotations

import statistics
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import regard
from bench.held_out import held_out_books
from bench.measuring import Run, allocated, clock, compare
from bench.results import Report, command_line
from regard.cache import (
    TOVA,
    Adaptive,
    KeepAll,
    Knorm,
    ObservedAttention,
    Policy,
    Pyramid,
    Random,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
)

READING: dict[str, Policy] = {
    "observed attention": ObservedAttention(budget=0.25),
    "SnapKV": SnapKV(budget=0.25),
    "SnapKV, by head": SnapKV(budget=Adaptive(0.25)),
    "TOVA": TOVA(budget=0.25),
    "StreamingLLM": StreamingLLM(budget=0.25),
    "Knorm": Knorm(budget=0.25),
    "keep all": KeepAll(),
}
DECODING = ("SnapKV", "SnapKV, by head", "observed attention", "TOVA", "StreamingLLM")
Recall = dict[str, dict[float, tuple[float, float, float]]]  # exact match and its interval, by policy and budget
BUDGETS = (1.0, 0.5, 0.25, 0.15, 0.1, 0.05)
LENGTH, DISTRACTORS, BATCH, SEED = 512, 4, 8, 11


def llama(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        vocab_size=8192, max_position_embeddings=32768, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device)


def block(model: LlamaForCausalLM, policy: Policy | None) -> AbstractContextManager[object]:
    return nullcontext() if policy is None else regard.compress(model, policy)


def tokens(length: int, device: str) -> Tensor:
    return torch.randint(3, 8000, (1, length), generator=torch.Generator().manual_seed(length)).to(device)


def read(model: LlamaForCausalLM, ids: Tensor, policy: Policy | None) -> DynamicCache:
    with torch.inference_mode(), block(model, policy):
        cache: DynamicCache = model(
            ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1
        ).past_key_values
    return cache


def reading_table(length: int, device: str, repeats: int) -> Table:
    model, ids = llama(device), tokens(length, device)
    runs: dict[str, Run] = {"plain": partial(read, model, ids, None)}
    runs |= {name: partial(read, model, ids, policy) for name, policy in READING.items()}
    seconds, ratios = compare(runs, device, repeats)
    table = Table("policy, a quarter of the cache", "ratio to plain", title=f"reading {length:,} tokens")
    table.add_row("plain", f"{seconds:.2f} s")
    for name in list(runs)[1:]:
        table.add_row(name, f"{ratios[name]:.2f}×")
    return table


def seconds_per_step(model: LlamaForCausalLM, ids: Tensor, policy: Policy | None, steps: int, device: str) -> float:
    with torch.inference_mode(), block(model, policy):
        cache = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
        token = ids[:, :1]
        return statistics.median(clock(lambda: model(token, past_key_values=cache), device) for _ in range(steps))


def decoding_memory(model: LlamaForCausalLM, ids: Tensor, policy: Policy | None) -> int:
    """Bytes that 40 steps of decoding hold at their peak, the cache included."""

    def read_text() -> Run:
        cache = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values

        def decode() -> None:
            for _ in range(40):
                model(ids[:, :1], past_key_values=cache)

        return decode

    with torch.inference_mode(), block(model, policy):
        return allocated(read_text)


def decoding_table(length: int, device: str, rounds: int) -> Table:
    model, ids = llama(device), tokens(length, device)
    policies: dict[str, Policy | None] = {"plain": None} | {name: READING[name] for name in DECODING}
    times = [
        {name: seconds_per_step(model, ids, policy, 12, device) for name, policy in policies.items()}
        for _ in range(rounds)
    ]
    table = Table(
        "policy",
        "tokens/s",
        "ratio to plain",
        "cache, MB",
        "peak, MB",
        title=f"decoding after {length:,} tokens",
    )
    for name, policy in policies.items():
        ratio = statistics.median(of["plain"] / of[name] for of in times)
        left = read(model, ids, policy)
        size = sum(tensor.nbytes for layer in left.layers for tensor in _tensors(layer))
        most = decoding_memory(model, ids, policy)
        rate = statistics.median(1 / of[name] for of in times)
        table.add_row(name, f"{rate:.1f}", f"{ratio:.2f}×", f"{size / 1e6:.0f}", f"{most / 1e6:.0f}")
    return table


def _tensors(layer: Any) -> list[Tensor]:
    groups = getattr(layer, "groups", [layer])
    return [tensor for group in groups for tensor in (group.keys, group.values)]


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


def facts(folder: Path | None, samples: int) -> Recall:
    """Accuracy with its interval, by policy and budget."""
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
            for name, policy in policies(model, budget, profiled).items():
                figure = proportion(name, recalled(model, rows, policy), samples)
                found.setdefault(name, {})[budget] = (figure.value, figure.low, figure.high)
                bar.update(task, description=f"{budget:.0%}, {name}")
            bar.advance(task)
    return found


def facts_table(found: Recall, samples: int) -> Table:
    title = f"{samples} facts asked for, {DISTRACTORS} distractors, {LENGTH} tokens: exact match, 95% interval"
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
    parser.add_argument("--facts", action="store_true", help="recall against the budget, instead of time and memory")
    parser.add_argument("--held-out", type=Path, help="folder of books; by default the chapter that ships")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="write the recall as a picture, an HTML page")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.facts:
        samples = 24 if arguments.quick else arguments.samples
        with Report("cache_facts", arguments.save, width=150) as report:
            found = facts(arguments.held_out, samples)
            report.show(facts_table(found, samples))
        if arguments.plot:
            facts_plot(found, samples).write_html(arguments.plot)
        return
    with Report("cache", arguments.save, width=150) as report:
        for length, repeats in ((1024, 3),) if arguments.quick else ((4096, 7), (16384, 3)):
            report.show(reading_table(length, device, repeats), decoding_table(length, device, repeats))


if __name__ == "__main__":
    main()
