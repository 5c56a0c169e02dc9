"""Which mixer models language best at equal size: small language models on a slice of book text.

    python -m bench.books --data BOOKS --held-out BOOKS [--quick] [--only NAME ...] [--seeds 2] [--results FILE] [--save]

Every mixer in a model of the same parameters, on the same tokens in the same order. Prints one table: validation loss in nats
for each token, the mean and the range over the seeds. A run that was interrupted goes on.
"""

from __future__ import annotations

import statistics
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from training.books import Books

import regard
from bench.results import Report, command_line
from bench.small_models import Batch, Results, SmallModel, loss_of, maker, train
from regard.mixers import catalogue

DIM, LAYERS, PARAMETERS, RATE = 64, 2, 62_000, 1e-2
TOKENS, BATCH, VOCABULARY = 256, 8, 2048


def batch_of(books: Books, random: np.random.Generator, size: int) -> Batch:
    windows = torch.from_numpy(np.stack([books.window(random, TOKENS + 1) for _ in range(size)]))
    return windows[:, :-1], windows[:, 1:]


def validation_loss(name: str, text: Books, held_out: Books, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    model = SmallModel(maker(name), VOCABULARY, DIM, LAYERS, PARAMETERS)
    train(model, lambda done: batch_of(text, random, BATCH), steps, RATE)
    fixed = np.random.default_rng(12345)
    with torch.no_grad():
        return statistics.mean(float(loss_of(model, batch_of(held_out, fixed, BATCH))) for _ in range(16))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of books to learn from")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of other books")
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed: shows that it runs")
    parser.add_argument("--only", nargs="*", help="these mixers only")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("run/books.jsonl"))
    arguments = parser.parse_args()
    steps, seeds = (20, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    names = [catalogue.mixer_named(name).__name__ for name in arguments.only or catalogue.mixers()]
    _, tokenizer = regard.mini()
    source = arguments.data.resolve()
    cache = arguments.results.parent / f"books-{zlib.crc32(bytes(source)):08x}.npz"
    cache.parent.mkdir(parents=True, exist_ok=True)
    text, held_out = Books.read(source, tokenizer, cache), Books.read(arguments.held_out, tokenizer)
    keys = {(name, seed): f"{name}, {steps} steps on {source}, seed {seed}" for name in names for seed in range(seeds)}
    results = Results(arguments.results).of(
        {keys[name, seed]: partial(validation_loss, name, text, held_out, steps, seed) for name, seed in keys}
    )
    found = {name: [results[keys[name, seed]] for seed in range(seeds)] for name in names}
    table = Table(
        "mixer", "validation loss", "range over seeds", title=f"{steps * BATCH * TOKENS:,} tokens, {seeds} seeds"
    )
    for name, losses in sorted(found.items(), key=lambda item: statistics.mean(item[1])):
        table.add_row(name, f"{statistics.mean(losses):.3f}", f"{min(losses):.3f} … {max(losses):.3f}")
    with Report("books", arguments.save, width=100) as report:
        report.show(table)


if __name__ == "__main__":
    main()
