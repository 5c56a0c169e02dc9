"""What the statistics of one attention call cost beside plain SDPA, quiet or beside a busy process.

    python -m bench.kernels [--busy] [--repeats 15] [--threads 2]

Every line is one shape of call: the time of plain SDPA, and as medians of ratios within one run, that of the attention
output together with each statistic (all from one pass). ``--busy`` keeps a core busy with another process meanwhile; SDPA
is measured beside it too. ``--cpu-time`` counts the seconds that the process computed instead of those that passed: with
one thread, that is comparable on a machine that others use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from bench.results import Report, command_line

QUESTIONS = {
    "+ mass": ("mass",),
    "+ entropy": ("entropy",),
    "+ received": ("received",),
    "all three": ("mass", "entropy", "received"),
}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    key_heads: int
    tokens: int
    width: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        return f"B {self.batch}, H {heads}, N {self.tokens:,}, D {self.width}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def split(heads: int) -> Tensor:  # as models have them
            flat = torch.randn(self.batch, self.tokens, heads, self.width, generator=generator)
            return flat.transpose(1, 2)

        return split(self.heads), split(self.key_heads), split(self.key_heads)


SHAPES = (
    Shape(1, 8, 8, 4096, 64),
    Shape(1, 8, 8, 2048, 16),
    Shape(1, 9, 3, 2048, 64),
    Shape(1, 8, 8, 64, 32),
    Shape(1, 8, 8, 128, 32),
    Shape(1, 8, 8, 256, 32),
    Shape(8, 8, 8, 256, 32),
)


def observed(query: Tensor, key: Tensor, value: Tensor, questions: tuple[str, ...]) -> Tensor:
    """The attention output, and beside it the statistics named."""
    segments = {"sink": [0], "early": slice(1, query.shape[2] // 8), "late": slice(query.shape[2] // 8, None)}
    attention = regard.AttentionMap(query, key, is_causal=True, enable_gqa=True)
    for question in questions:
        attention.expect(question, *([segments] if question == "mass" else []))
    attention.expect("product", value)
    output = attention @ value
    for question in questions:
        getattr(attention, question)(*([segments] if question == "mass" else []))
    return output


def _spin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    while True:
        pass


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps one core busy."""
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else None
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(core,), daemon=True)
    process.start()
    time.sleep(3)  # until it spins
    try:
        yield
    finally:
        process.kill()
        process.join()


def measure(shape: Shape, repeats: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Seconds of plain SDPA, and the ratio to it of each question."""
    query, key, value = shape.tensors()
    runs: list[Callable[[], Tensor]] = [
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    ]
    runs += [lambda asked=asked: observed(query, key, value, asked) for asked in QUESTIONS.values()]
    calls = max(1, 2**22 // (shape.batch * shape.heads * shape.tokens**2))  # short ones are timed many at a time
    times: list[list[float]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            for _ in range(calls):
                run()
            if number:  # the first warms up
                taken.append((clock() - start) / calls)
    plain = times[0]
    ratios = [statistics.median(t / p for t, p in zip(taken, plain, strict=True)) for taken in times[1:]]
    return statistics.median(plain), ratios


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--cpu-time", action="store_true", help="seconds computed, not seconds passed")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    beside = "beside a busy process" if options.busy else "quiet"
    counted = "CPU time" if options.cpu_time else "wall time"
    table = Table(title=f"output and statistics, × plain SDPA (CPU, float32, causal, {beside}, {counted})")
    for column in ("call", "SDPA, µs", *QUESTIONS):
        table.add_column(column, justify="right")
    with torch.no_grad(), busy_process() if options.busy else contextlib.nullcontext():
        for shape in SHAPES:
            seconds, ratios = measure(shape, options.repeats, clock)
            table.add_row(str(shape), f"{1e6 * seconds:,.0f}", *(f"{ratio:.2f}×" for ratio in ratios))
    with Report("kernels", options.save, width=110) as report:
        report.show(table)


if __name__ == "__main__":
    main()
