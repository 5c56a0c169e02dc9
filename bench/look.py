"""What `regard look` takes beside a plain pass of the same model, over lengths and widths of heads.

    python -m bench.look [--threads 1] [--rounds 3] [--save]

Every line is one shape of model, of random weights: the processor time of a plain pass, and as medians of ratios within one
round that of a look with everything that a report shows (offsets and targets, entropy, masses, distances, what keys
receive, the picture), its dataset put together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import Module

from bench.results import Report, command_line
from regard.look import look

LENGTHS = (2048, 4096, 8192)


@dataclass(frozen=True)
class Heads:
    number: int
    width: int
    layers: int = 2

    def model(self) -> Module:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        width = self.number * self.width
        config = LlamaConfig(
            hidden_size=width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.number,
            intermediate_size=4 * width,
            vocab_size=2000,
            max_position_embeddings=max(LENGTHS),
        )
        return LlamaModel(config).eval()


SHAPES = (Heads(9, 64), Heads(32, 16), Heads(8, 16))


class Numbers:
    """A tokenizer of texts that are numbers of tokens."""

    model_max_length = 10**9

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(number) for number in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def measure(heads: Heads, tokens: int, rounds: int) -> tuple[float, float]:
    """Processor seconds of a plain pass, and how many times that a look takes."""
    model = heads.model()
    ids = torch.randint(0, 2000, (1, tokens), generator=torch.Generator().manual_seed(0))
    text = " ".join(map(str, ids[0].tolist()))

    @torch.inference_mode()
    def plain() -> Tensor:
        output: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return output

    plain()
    look(model, Numbers(), text, max_tokens=256)  # what is compiled once
    times = [(seconds(plain), seconds(lambda: look(model, Numbers(), text))) for _ in range(rounds)]
    return statistics.median(base for base, _ in times), statistics.median(seen / base for base, seen in times)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title="regard look, as a multiple of a plain pass (processor time)")
    for column in ("heads", *(f"N = {tokens:,}" for tokens in LENGTHS)):
        table.add_column(column, justify="right")
    with Report("look", arguments.save) as report:
        for heads in SHAPES:
            measured = [measure(heads, tokens, arguments.rounds) for tokens in LENGTHS]
            cells = [f"{ratio:.2f}× of {base:.2f} s" for base, ratio in measured]
            table.add_row(f"{heads.number} of {heads.width}", *cells)
        report.show(table)


if __name__ == "__main__":
    main()
