"""What training through every mixer takes, beside softmax attention: memory at the peak, and processor time.

    python -m bench.training [--only NAME ...] [--what memory time] [--heads H] [--save]

Memory is what tensors hold at the peak of a forward and a backward pass of the layer (dim 1,024, 8,192 tokens, batch 1), the
tokens and all gradients included. Time is one thread's for a forward pass without gradients, and for a forward and a
backward pass (dim 128, 4,096 tokens), each as the median over rounds of its ratio to that of `SoftmaxAttention`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from bench.measuring import Run, allocated, in_fresh_process
from bench.results import Report, command_line
from regard.mixers import Mixer, catalogue

WIDE, LONG = 1024, 8192
NARROW, SHORT = 128, 4096
BASE = "SoftmaxAttention"


def made(name: str, dim: int, heads: int | None) -> Mixer:
    given: dict[str, Any] = {} if heads is None else {"heads": heads}
    torch.manual_seed(0)
    return catalogue.mixer_named(name)(dim, **given)


def forward(mixer: Mixer, tokens: int) -> Run:
    x = torch.randn(1, tokens, mixer.dim)

    def run() -> None:
        with torch.no_grad():
            mixer(x)

    return run


def backward(mixer: Mixer, tokens: int) -> Run:
    x = torch.randn(1, tokens, mixer.dim, requires_grad=True)

    def run() -> None:
        y, _ = mixer(x)
        y.sum().backward()
        mixer.zero_grad()
        x.grad = None

    return run


def peak_of(name: str, heads: int | None) -> float:
    """Bytes held at the peak of a forward and a backward pass."""
    warnings.filterwarnings("ignore", module="torch.profiler")
    mixer = made(name, WIDE, heads)
    backward(mixer, 64)()
    return allocated(lambda: backward(mixer, LONG))


def seconds(run: Run) -> float:
    """Of the processor, not of the clock: others may be using the machine too."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio_of(name: str, heads: int | None, make: Callable[[Mixer, int], Run], rounds: int) -> tuple[float, float]:
    """Median seconds, and the median of the rounds' ratios to softmax attention."""
    base, run = (make(made(each, NARROW, heads), SHORT) for each in (BASE, name))
    base(), run()
    pairs = [(seconds(base), seconds(run)) for _ in range(rounds)]
    return statistics.median(own for _, own in pairs), statistics.median(own / other for other, own in pairs)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="*", help="these mixers only")
    parser.add_argument("--what", nargs="*", choices=("memory", "time"), default=["memory", "time"])
    parser.add_argument("--heads", type=int, help="of every mixer; its own default otherwise")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [catalogue.mixer_named(name).__name__ for name in arguments.only or catalogue.mixers()]
    table = Table(
        "mixer", title=f"one layer; memory at dim {WIDE}, {LONG:,} tokens, time at dim {NARROW}, {SHORT:,} tokens"
    )
    for column in ("MB", "× softmax", "forward, ms", "× softmax ", "and backward, ms", "× softmax  "):
        table.add_column(column, justify="right")
    peaks = partial(in_fresh_process, peak_of)
    base = peaks(BASE, arguments.heads) if "memory" in arguments.what else 0.0
    with Progress(transient=True) as bar:
        for name in bar.track(names, description="mixers"):
            row = ["–"] * 6
            if "memory" in arguments.what:
                peak = peaks(name, arguments.heads)
                row[:2] = f"{peak / 1e6:,.0f}", f"{peak / base:.2f}"
            if "time" in arguments.what:
                for place, make in ((2, forward), (4, backward)):
                    own, ratio = ratio_of(name, arguments.heads, make, arguments.rounds)
                    row[place : place + 2] = f"{1000 * own:.0f}", f"{ratio:.2f}"
            table.add_row(name, *row)
            bar.console.print(name, *row)
    with Report("training", arguments.save) as report:
        report.show(table)


if __name__ == "__main__":
    main()
