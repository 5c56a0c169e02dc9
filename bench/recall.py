"""What mixers recall: keys bound to values in context, asked for later, against the size of what they remember.

    python -m bench.recall [--quick] [--all | --only NAME ...] [--seeds N ...] [--layers N] [--results FILE] [--save]

Multi-query associative recall, as in Zoology (S. Arora et al., 2023): pairs of a key and a value, and between them keys of
earlier pairs again, each to be answered with its value. Models of equal parameter counts, a short convolution and one layer,
are trained on 4 to 24 pairs, few at first, and tested on each number, and on the mean of them after other texts, which bind
the same keys to other values: up to 2,048 tokens, 26 times those of training. By default the delta rule and the memories that
are to recall no less than it, of three seeds each, with the lowest and the highest result: 8 minutes of processor time.
``--all`` takes every mixer at its sizes, of one seed. Prints one table, and draws recall against the bytes of state. A run
that was interrupted goes on.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import plotly.graph_objects as go
import torch
from plotly import colors
from rich.table import Table

from bench.results import Report, command_line
from bench.small_models import Batch, Results, SmallModel, maker, state_bytes, train
from regard.mixers import Memory, catalogue

DIM, PARAMETERS, RATE = 64, 62_000, 1e-2  # parameters of a layer
KEYS = VALUES = 32
TOKENS, PAIRS = 80, (4, 8, 16, 24)
EARLIER = (240, 960, 1968)  # tokens of other texts before the one that is asked for
COMPARED = ("DeltaRule", "LongTermMemory", "Yaad")
SEEDS = (10, 11, 12)  # not those by which the layers' settings were chosen
Size = dict[str, Any]
MEMORIES = ("Moneta", "Yaad", "Memora", "LongTermMemory", "MemoryAsContext", "MemoryAsGate", "MemoryAsLayer")
LINES: dict[str, tuple[str, list[Size]]] = {  # mixers of several sizes of state, by what makes it larger
    "Based, features": ("Based", [{"features": f, "window": 2} for f in (2, 4, 8)]),
    "Based, window": ("Based", [{"features": 2, "window": w} for w in (2, 16, 48)]),
    "TaylorAttention, features": ("TaylorAttention", [{"features": f} for f in (2, 4, 8)]),
    "SlidingWindow, window": ("SlidingWindow", [{"window": w} for w in (2, 16, 48)]),
    "DeltaRule, heads": ("DeltaRule", [{"heads": h} for h in (4, 1)]),
    "GatedDeltaRule, heads": ("GatedDeltaRule", [{"heads": h} for h in (4, 1)]),
    "LightNet, heads": ("LightNet", [{"heads": h} for h in (16, 4)]),
    "LightningAttention, heads": ("LightningAttention", [{"heads": h} for h in (16, 4, 1)]),
    "CHELA, heads": ("CHELA", [{"heads": h} for h in (16, 4, 1)]),
    "FAST, heads": ("FAST", [{"heads": h} for h in (16, 4)]),
    "LongVQ, codes": ("LongVQ", [{"codes": c, "window": 2} for c in (4, 64)]),
    "SelectiveSSM, states": ("SelectiveSSM", [{"state_size": s} for s in (4, 16)]),
    "Miras, heads": ("Miras", [{"heads": h} for h in (16, 4)]),
    **{f"{name}, expansion": (name, [{"expansion": e} for e in (1, 4)]) for name in MEMORIES},
}


def texts(batch: int, pairs: int, generator: torch.Generator) -> Batch:
    """Pairs, and between them keys of pairs so far, whose values are the targets."""
    asked = TOKENS - 2 * pairs
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, KEYS + VALUES, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs + asked, generator=generator).index_fill_(1, torch.tensor(0), 0.0)
    is_pair = order.argsort(1).argsort(1) < pairs  # the first is one, for something to be asked
    so_far = is_pair.cumsum(1)
    earlier = (torch.rand(is_pair.shape, generator=generator) * so_far).long()
    which = torch.where(is_pair, so_far - 1, earlier)
    place = (is_pair + 1).cumsum(1) - is_pair.long() - 1
    ids = torch.zeros(batch, TOKENS, dtype=torch.long).scatter_(1, place, keys.gather(1, which))
    answers = values.gather(1, which)
    targets = torch.full_like(ids, -100).scatter_(1, place, answers.masked_fill(is_pair, -100))
    rows = torch.arange(batch)[:, None].expand_as(is_pair)
    ids[rows[is_pair], place[is_pair] + 1] = answers[is_pair]
    return ids, targets


def recall(name: str, size: Size, layers: int, batch: int, steps: int, seed: int) -> dict[str, Any]:
    """Train one model; its accuracy at each number of pairs, the size of its state and of its weights, and processor time."""
    began = time.process_time()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallModel(maker(name, **arguments_of(size)), KEYS + VALUES, DIM, layers, PARAMETERS)

    def batches(done: float) -> Batch:
        """Two pairs for a beginning, then more and more."""
        numbers = (2,) if done < 1 / 6 else PAIRS[: 1 + int(6 * done)]
        pairs = numbers[int(torch.randint(len(numbers), (1,), generator=generator))]
        return texts(batch, pairs, generator)

    train(model, batches, steps, RATE)
    held_out = torch.Generator().manual_seed(10_000 + seed)
    right = {pairs: answered(model, 256, pairs, 0, held_out) for pairs in PAIRS}
    late = {
        earlier: sum(answered(model, 32, pairs, earlier, held_out) for pairs in PAIRS) / len(PAIRS)
        for earlier in EARLIER
    }
    weights = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.process_time() - began
    return {
        "recall": right, "late": late, "state": state_bytes(model, TOKENS), "weights": weights, "seconds": seconds,
    }  # fmt: skip


@torch.no_grad()
def answered(model: SmallModel, batch: int, pairs: int, earlier: int, generator: torch.Generator) -> float:
    """The share of right answers in texts, each after so many tokens of others."""
    before = [texts(batch, pairs, generator)[0] for _ in range(-(-earlier // TOKENS))]
    ids, targets = texts(batch, pairs, generator)
    logits = model(torch.cat([*before, ids], dim=1)[:, -(earlier + TOKENS) :])[:, -TOKENS:]
    asked = targets >= 0
    return float((logits.argmax(-1) == targets)[asked].float().mean())


def arguments_of(size: Size) -> dict[str, Any]:
    """Of a mixer; how much wider the hidden layer is than its input is a matter of its memory."""
    return {"memory": Memory(expansion=size["expansion"])} if "expansion" in size else size


def lines_of(names: list[str], sizes: bool) -> dict[str, tuple[str, list[Size]]]:
    """A point for each of these mixers; or, with sizes, a line for each that has several."""
    if not sizes:
        return {name: (name, [{}]) for name in names}
    several = {mixer for mixer, _ in LINES.values()}
    points: dict[str, tuple[str, list[Size]]] = {name: (name, [{}]) for name in names if name not in several}
    return {name: line for name, line in LINES.items() if line[0] in names} | points


def label_of(name: str, size: Size) -> str:
    return name + (f" ({', '.join(f'{key} {value}' for key, value in size.items())})" if size else "")


def plot(found: dict[str, list[dict[str, Any]]], lines: dict[str, tuple[str, list[Size]]]) -> go.Figure:
    """Mean recall against state."""
    figure = go.Figure()
    for number, (name, (mixer, sizes)) in enumerate(lines.items()):
        labels = [label_of(mixer, size) for size in sizes]
        figure.add_scatter(
            x=[found[label][0]["state"] for label in labels],
            y=[mean([mean([*result["recall"].values()]) for result in found[label]]) for label in labels],
            hovertext=labels, name=name, mode="lines+markers" if len(sizes) > 1 else "markers",
            marker={"size": 10, "symbol": number % 25, "color": colors.qualitative.Dark24[number % 24]},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", width=1000, height=640, title="Recall against what is remembered",
        xaxis={"title": "state, bytes of a text", "type": "log", "dtick": 1},
        yaxis={"title": "answers right, mean over 4 to 24 pairs", "range": [0, 1.03], "tickformat": ".0%"},
    )  # fmt: skip
    return figure


def table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each mixer, that with the least state first."""
    late = (f"after {earlier:,}" for earlier in EARLIER)
    made = Table("mixer", "weights", "state, bytes", "seconds", *(f"{pairs} pairs" for pairs in PAIRS), *late)
    for label, results in sorted(found.items(), key=lambda item: item[1][0]["state"]):
        each = zip(*([*result["recall"].values(), *result["late"].values()] for result in results), strict=True)
        seconds = mean([result["seconds"] for result in results])
        sizes = f"{results[0]['weights']:,}", f"{results[0]['state']:,}", f"{seconds:.0f}"
        made.add_row(label, *sizes, *(spread(list(values)) for values in each))
    return made


def spread(values: list[float]) -> str:
    """The mean, and of several values the lowest and the highest.

    >>> spread([0.5]), spread([0.5, 0.6, 0.7])
    ('0.50', '0.60 (0.50–0.70)')
    """
    around = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{around}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="60 steps: shows that it runs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every mixer, at several sizes of its state")
    which.add_argument("--only", nargs="*", default=COMPARED, help="these mixers only")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="texts of a step of training")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="*", help="by default three, with --all one")
    parser.add_argument("--results", type=Path, default=Path("run/recall.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("run/recall.html"))
    arguments = parser.parse_args()
    steps = 60 if arguments.quick else arguments.steps
    seeds = arguments.seeds or (SEEDS[:1] if arguments.all else SEEDS)
    names = list(catalogue.mixers()) if arguments.all else arguments.only
    lines = lines_of([catalogue.mixer_named(name).__name__ for name in names], arguments.all)
    runs = {label_of(mixer, size): (mixer, size) for mixer, sizes in lines.values() for size in sizes}
    training = arguments.layers, arguments.batch, steps
    told = "{} layers, batches of {}, {} steps".format(*training)
    keys = {(label, seed): f"{label}, {told} at {RATE}, seed {seed}" for seed, label in product(seeds, runs)}
    results = Results(arguments.results).of(
        {key: partial(recall, *runs[label], *training, seed) for (label, seed), key in keys.items()}
    )
    found = {label: [results[keys[label, seed]] for seed in seeds] for label in runs}
    with Report("recall", arguments.save, width=190) as report:
        report.show(table(found))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(found, lines).write_html(arguments.plot)


if __name__ == "__main__":
    main()
