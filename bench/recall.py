"""What mixers recall: keys bound to values in context, asked for later, against the size of what they remember.

    python bench/recall.py [--quick] [--only NAME ...] [--results FILE] [--plot FILE]

Multi-query associative recall, as in Zoology (S. Arora et al., 2023): pairs of a key and a value, then the keys again in
random places, each to be answered with its value. Models of two layers and equal parameter counts are trained on 4 to 32
pairs, and tested on each number. Prints one table, and draws recall against the bytes of state. A run that was interrupted
goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from regard.mixers import catalogue
from small_models import Batch, Results, SmallModel, maker, state_bytes, train

DIM, LAYERS, PARAMETERS = 64, 2, 56_000
KEYS = VALUES = 64
TOKENS, PAIRS = 128, (4, 8, 16, 32)
SIZES: dict[str, list[dict[str, Any]]] = {
    "Based": [{"features": f, "window": w} for f, w in ((4, 8), (8, 8), (16, 8), (8, 32), (16, 32))],
    "TaylorAttention": [{"features": f} for f in (4, 8, 16)],
    "SlidingWindow": [{"window": w} for w in (4, 16, 64)],
    "DeltaRule": [{"heads": h} for h in (1, 4, 16)],
    "GatedDeltaRule": [{"heads": h} for h in (1, 4, 16)],
    "LightningAttention": [{"heads": h} for h in (1, 4, 16)],
}


def texts(batch: int, pairs: int, generator: torch.Generator) -> Batch:
    """Pairs, then their keys again among filler, with the values as targets."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:pairs] for _ in range(batch)])
    values = torch.randint(KEYS, KEYS + VALUES, (batch, pairs), generator=generator)
    filler = KEYS + VALUES
    ids = torch.full((batch, TOKENS), filler)
    targets = torch.full((batch, TOKENS), -100)
    ids[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
    free = TOKENS - 2 * pairs
    places = torch.stack([torch.randperm(free, generator=generator)[:pairs] for _ in range(batch)]) + 2 * pairs
    ids.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return ids, targets


def recall(name: str, arguments: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """Train one model; its accuracy at each number of pairs, the size of its state, and of its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallModel(maker(name, **arguments), KEYS + VALUES + 1, DIM, LAYERS, PARAMETERS)

    def batches() -> Batch:
        pairs = PAIRS[int(torch.randint(len(PAIRS), (1,), generator=generator))]
        return texts(64, pairs, generator)

    train(model, batches, steps)
    right = {}
    held_out = torch.Generator().manual_seed(10_000 + seed)
    with torch.no_grad():
        for pairs in PAIRS:
            ids, targets = texts(256, pairs, held_out)
            asked = targets >= 0
            right[pairs] = float((model(ids).argmax(-1) == targets)[asked].float().mean())
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"recall": right, "state": state_bytes(model, TOKENS), "weights": weights}


def plot(found: dict[str, tuple[str, dict[str, Any]]]) -> go.Figure:
    """Mean recall against state, a line for each mixer."""
    figure = go.Figure()
    for mixer in sorted({mixer for mixer, _ in found.values()}):
        points = sorted(
            (result["state"], sum(result["recall"].values()) / len(PAIRS), label)
            for label, (own, result) in found.items()
            if own == mixer
        )
        states, means, labels = zip(*points, strict=True)
        figure.add_scatter(x=states, y=means, text=labels, name=mixer, mode="lines+markers")
    figure.update_layout(
        template="plotly_white", width=950, height=560, title="Recall against what is remembered",
        xaxis={"title": "state, bytes of a text", "type": "log"}, yaxis={"title": "answers right", "range": [0, 1.02]},
    )  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps: shows that it runs")
    parser.add_argument("--only", nargs="*", help="these mixers only")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("run/recall.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("run/recall.html"))
    arguments = parser.parse_args()
    steps = 60 if arguments.quick else arguments.steps
    names = [catalogue.mixer_named(name).__name__ for name in arguments.only or catalogue.mixers()]
    runs = [(name, size) for name in names for size in SIZES.get(name, [{}])]
    results, found = Results(arguments.results), {}
    with Progress() as bar:
        task = bar.add_task("training", total=len(runs))
        for name, size in runs:
            label = name + (f" ({', '.join(f'{key} {value}' for key, value in size.items())})" if size else "")
            bar.update(task, description=label)
            key = f"{label}, {steps} steps, seed {arguments.seed}"
            result = results.of(key, lambda name=name, size=size: recall(name, size, steps, arguments.seed))
            result["recall"] = {int(pairs): value for pairs, value in result["recall"].items()}
            found[label] = (name, result)
            bar.advance(task)
    table = Table("mixer", "weights", "state, bytes", *(f"{pairs} pairs" for pairs in PAIRS))
    for label, (_, result) in sorted(found.items(), key=lambda item: item[1][1]["state"]):
        table.add_row(
            label, f"{result['weights']:,}", f"{result['state']:,}", *(f"{result['recall'][p]:.2f}" for p in PAIRS)
        )
    Console(width=130).print(table)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(found).write_html(arguments.plot)


if __name__ == "__main__":
    main()
