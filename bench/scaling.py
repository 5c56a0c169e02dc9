"""How time, memory and state of every mixer grow with the text, beside scaled dot-product attention.

    python -m bench.scaling [--quick] [--only NAME ...] [--save]

Prints the milliseconds of a forward pass of the layer (dim 256, batch 1) at each length, the exponent fitted to the longest
lengths, and the time of one decoding step after a short and a long text with the bytes of its state; the same of the memory
that a pass holds at its peak; and the operators alone: SDPA, lightning attention, and on a GPU flash-linear-attention where
it is installed. ``--save`` keeps the figures, and the exponents of time for ``regard mixers``. Uses a GPU when there is one.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from bench.measuring import Run, allocated, clock, compare, extra_memory
from bench.results import Report, command_line
from regard.mixers import Mixer, catalogue, lightning_attention

DIM = 256
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
LIMIT, WATCHED = 20.0, 5.0  # seconds of one pass, and of one whose memory is watched; longer texts are left out
SAVED = Path(__file__).parent.parent / "src" / "regard" / "mixers" / "scaling.json"


def forward_times(mixer: Mixer, lengths: tuple[int, ...], device: str, repeats: int) -> dict[int, float]:
    """Median seconds of a forward pass by length, as far as the limit allows."""
    times: dict[int, float] = {}
    for length in lengths:
        x = torch.randn(1, length, DIM, device=device)
        first = clock(lambda x=x: mixer(x), device)
        times[length] = statistics.median(
            clock(lambda x=x: mixer(x), device) for _ in range(repeats if first < 1 else 1)
        )
        if 4 * times[length] > LIMIT:
            break
    return times


def exponent(found: dict[int, float]) -> float:
    """The slope of log time or memory against log length over the longest four lengths."""
    longest = sorted(found)[-4:]
    slope, _ = np.polyfit(np.log(longest), np.log([found[length] for length in longest]), 1)
    return float(slope)


def decoding(mixer: Mixer, length: int, device: str) -> tuple[float, int]:
    """Median seconds of one step after a text, and the bytes of its state."""
    _, state = mixer(torch.randn(1, length, DIM, device=device))
    token = torch.randn(1, DIM, device=device)
    return statistics.median(clock(lambda: mixer.decode(token, state), device) for _ in range(20)), state.bytes


def memory(mixer: Mixer, length: int, device: str) -> float:
    """Bytes held at the peak of a forward pass, what goes in and comes out included."""
    if device == "cuda":
        x = torch.randn(1, length, DIM, device=device)
        return x.nbytes + extra_memory(lambda: mixer(x), device)
    return allocated(lambda: partial(mixer, torch.randn(1, length, DIM)))


def layer_tables(
    names: list[str], lengths: tuple[int, ...], device: str, repeats: int
) -> tuple[Table, Table, dict[str, float]]:
    """Of time, of memory, and the exponents of time."""
    columns = ("mixer", *(f"{length:,}" for length in lengths), "N^")
    of_time, of_memory = (
        Table(title=f"one layer, dim {DIM}, {device}: {what} by tokens") for what in ("milliseconds", "MB at the peak")
    )
    for table, more in ((of_time, ("step, ms", "state, kB")), (of_memory, ())):
        for column in (*columns, *more):
            table.add_column(column, justify="left" if column == "mixer" else "right")
    found = {}
    with Progress(transient=True) as bar:
        for name in bar.track(names, description="mixers"):
            mixer = catalogue.mixer_named(name)(DIM).to(device).eval()
            times = forward_times(mixer, lengths, device, repeats)
            found[name] = round(exponent(times), 3)
            short, long = (decoding(mixer, length, device) for length in (lengths[0], min(max(times), 8192)))
            step, state = (
                f"{1000 * short[0]:.2f} → {1000 * long[0]:.2f}",
                f"{short[1] / 1e3:.0f} → {long[1] / 1e3:.0f}",
            )
            of_time.add_row(name, *cells(times, lengths, 1e3), step, state)
            held = {length: memory(mixer, length, device) for length, seconds in times.items() if seconds < WATCHED}
            of_memory.add_row(name, *cells(held, lengths, 1e-6))
    return of_time, of_memory, found


def cells(found: dict[int, float], lengths: tuple[int, ...], scale: float) -> list[str]:
    """What was found by length, and its exponent."""
    return [
        *(f"{scale * found[length]:.1f}" if length in found else "–" for length in lengths),
        f"{exponent(found):.2f}",
    ]


def operators(length: int, device: str) -> dict[str, Run]:
    """What is compared, SDPA first; on a GPU in bfloat16, with flash-linear-attention where it is installed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 8, length, 64, device=device, dtype=dtype)
    decay = (-torch.linspace(0.01, 1, 8, device=device)).exp()
    runs: dict[str, Run] = {
        "SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "lightning": lambda: lightning_attention(q, k, v, decay),
    }
    if device == "cuda" and importlib.util.find_spec("fla") is not None:
        from fla.ops.simple_gla import chunk_simple_gla

        query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))  # tokens before heads
        logs = decay.log().expand(1, length, 8).contiguous()
        runs["flash-linear-attention"] = lambda: chunk_simple_gla(query, key, value, g=logs, scale=1.0)
    return runs


def operator_table(lengths: tuple[int, ...], device: str, repeats: int) -> Table:
    title = f"operators, 8 heads of width 64, {device}: milliseconds, and how many times as fast as SDPA"
    table = Table(title=title)
    for length in lengths:
        runs = operators(length, device)
        if not table.columns:
            for column in ("tokens", *runs):
                table.add_column(column, justify="right")
        seconds, ratios = compare(runs, device, repeats)
        cells = [f"{1000 * seconds * ratio:.1f} ({1 / ratio:.1f}×)" for ratio in ratios.values()]
        table.add_row(f"{length:,}", *cells)
    return table


@torch.no_grad()
def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens, one repeat")
    parser.add_argument("--only", nargs="*", help="these mixers only")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.profiler")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [catalogue.mixer_named(name).__name__ for name in arguments.only or catalogue.mixers()]
    lengths = LENGTHS[:5] if arguments.quick else LENGTHS
    with Report("scaling", arguments.save, width=170) as report:
        of_time, of_memory, found = layer_tables(names, lengths, device, 1 if arguments.quick else 3)
        report.show(of_time, of_memory)
        report.show(operator_table((2048, 8192) if arguments.quick else (2048, 8192, 16384), device, 5))
    if arguments.save:
        SAVED.write_text(json.dumps(catalogue.exponents() | found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
