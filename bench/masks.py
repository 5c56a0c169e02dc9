"""What attention under a rule costs, beside causal scaled_dot_product_attention: forward, and forward and backward.

    python -m bench.masks [--quick]

One head of width 64. Each ratio is the median over rounds of time by the rule to time by SDPA, measured side by side; "all"
asks for entropy, received and a mass besides. The largest tensor, of a forward and backward pass, is given beside N² entries.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from bench.measuring import Run, compare
from bench.results import Report, command_line
from regard import masks

WIDTH = 64


def rules(tokens: int) -> dict[str, masks.Mask]:
    """By name; the grid is as nearly square as may be."""
    high = 2 ** int(math.log2(tokens) / 2)
    return {
        "window 1024": masks.window(1023, 0),
        "window 256": masks.window(255, 0),
        "neighbourhood 2-D, 13×13": masks.neighbourhood((high, tokens // high), 13),
        "documents of 1024, causal": masks.documents([1024] * (tokens // 1024)) & masks.causal(),
    }


def ask(mask: masks.Mask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The product and three statistics, in one pass; their sum."""
    attention, sink = regard.AttentionMap(query, key, mask=mask), {"sink": [0]}
    for question in (("entropy",), ("received",), ("mass", sink), ("product", value)):
        attention.expect(*question)
    answers = (attention @ value, attention.entropy(), attention.received(), attention.mass(sink))
    return torch.stack([answer.sum() for answer in answers]).sum()


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor made, in this thread."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(run: Run) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Largest() as found:
        run()
    torch.set_num_threads(threads)
    return found.entries


def add_rows(table: Table, tokens: int, device: str, repeats: int) -> None:
    q, k, v = torch.randn(3, 1, 1, tokens, WIDTH, device=device)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]

    def gradient(run: Run) -> object:
        return torch.autograd.grad(run().sum(), inputs)  # type: ignore[attr-defined]

    sdpa = scaled_dot_product_attention
    forward: dict[str, Run] = {"SDPA, causal": partial(sdpa, q, k, v, is_causal=True)}
    both: dict[str, Run] = {"SDPA, causal": partial(gradient, partial(sdpa, *inputs, is_causal=True))}
    for name, mask in rules(tokens).items():
        forward[name] = partial(regard.attention, q, k, v, mask=mask)
        both[name] = partial(gradient, partial(regard.attention, *inputs, mask=mask))
        forward[f"{name}, all"] = partial(ask, mask, q, k, v)
        both[f"{name}, all"] = partial(gradient, partial(ask, mask, *inputs))
    (seconds, ratios), (seconds_both, ratios_both) = (compare(runs, device, repeats) for runs in (forward, both))
    for name in forward:
        cells = [f"{1000 * seconds * ratios[name]:.0f} ms", f"{ratios[name]:.3f}"]
        cells += [f"{1000 * seconds_both * ratios_both[name]:.0f} ms", f"{ratios_both[name]:.3f}"]
        entries = "–" if name.startswith("SDPA") else f"{largest(both[name]) / tokens**2:.4f} N²"
        table.add_row(f"{tokens:,}", name, *cells, entries)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="8,192 tokens only")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title=f"one head of width {WIDTH}, {device}, {torch.get_num_threads()} threads")
    for column in ("tokens", "mask", "forward", "to SDPA", "and backward", "to SDPA", "largest tensor"):
        table.add_column(column, justify="left" if column == "mask" else "right")
    with Report("masks", arguments.save) as report:
        add_rows(table, 8192, device, 5)
        if not arguments.quick:
            add_rows(table, 32768, device, 3)
        report.show(table)


if __name__ == "__main__":
    main()
