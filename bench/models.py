"""What watching costs a whole model: short texts, decoding, and a model of SmolLM2-135M's shape at 2,048 tokens.

    python -m bench.models [--quick] [--cpu-time] [--save]

Random Llamas of transformers. Every figure is the median over rounds of the time of a pass, or of decoding, inside a block
that watches, to that of the model alone, side by side. ``--cpu-time`` counts the seconds that the process computed instead
of those that passed, which is comparable on a machine that others use (with one thread).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from bench.results import Report, command_line
from regard.watch import Entropy, Mass, Received, Statistic

SEGMENTS = {"first": [0], "rest": slice(1, None)}
STATISTICS: dict[str, Callable[[], list[Statistic]]] = {
    "one": lambda: [Entropy()],
    "three": lambda: [Mass(SEGMENTS), Entropy(), Received()],
}
ASKED = ("alone", "looks at nothing", *STATISTICS)


def small() -> nn.Module:
    """8 layers, width 256, 8 heads."""
    return llama(8, 256, 8, 8)


def llama(layers: int, width: int, heads: int, key_heads: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seconds(model: nn.Module, run: Callable[[], object], asked: str, clock: Callable[[], float]) -> float:
    """What one run takes, alone or in a block, of which entering and leaving are a part if it looks at something."""
    start = clock()
    if asked == "alone":
        run()
    elif asked == "looks at nothing":
        with regard.watch(model, Entropy(), passes=[0]):
            model(torch.zeros(1, 1, dtype=torch.long))  # the pass that it looks at
            start = clock()
            run()
            return clock() - start
    else:
        with regard.watch(model, *STATISTICS[asked]()):
            run()
    return clock() - start


def ratios(model: nn.Module, run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> list[str]:
    """Milliseconds alone, and the ratio of each block to it."""
    taken: dict[str, list[float]] = {asked: [] for asked in ASKED}
    for number in range(repeats + 1):
        for asked in ASKED:
            spent = seconds(model, run, asked, clock)
            if number:  # the first warms up
                taken[asked].append(spent)
    alone = taken.pop("alone")
    found = [statistics.median(t / p for t, p in zip(times, alone, strict=True)) for times in taken.values()]
    return [f"{1e3 * statistics.median(alone):,.1f}", *(f"{ratio:.2f}×" for ratio in found)]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="short texts and decoding alone")
    parser.add_argument("--cpu-time", action="store_true", help="seconds computed, not seconds passed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    counted = "CPU time" if options.cpu_time else "wall time"
    table = Table(title=f"watching a model, × the model alone ({options.threads} threads, {counted})")
    for column in ("model", "run", "alone, ms", *ASKED[1:]):
        table.add_column(column, justify="left" if column in ("model", "run") else "right")
    with torch.no_grad():
        model = small()
        for tokens in (64, 128, 256):
            ids = torch.randint(0, 1000, (1, tokens))
            table.add_row("8 layers, d 256", f"{tokens} tokens", *ratios(model, lambda ids=ids: model(ids), 60, clock))
        prompt = torch.randint(0, 1000, (1, 32))
        generate = lambda: model.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)  # noqa: E731
        table.add_row("8 layers, d 256", "32 tokens decoded", *ratios(model, generate, 12, clock))
        if not options.quick:
            model = llama(30, 576, 9, 3)
            ids = torch.randint(0, 1000, (1, 2048))
            table.add_row("30 layers, d 576, 9/3 heads", "2,048 tokens", *ratios(model, lambda: model(ids), 5, clock))
    with Report("models", options.save, width=120) as report:
        report.show(table)


if __name__ == "__main__":
    main()
