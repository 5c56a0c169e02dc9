"""What it costs to steer: edited attention beside plain attention and beside the usual way.

    python -m bench.steer [--quick] [--save]

Prints edits of one call as medians of ratios to plain SDPA within one run, then the tokens per second of a whole model that
decodes, plain, steered, and with eager attention to which an additive mask is given. Uses a GPU when there is one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import regard
from bench.measuring import Run, clock, compare
from bench.results import Report, command_line
from regard.steer import Edit

HEADS, WIDTH = 8, 64
EIGHT = tuple(regard.Reweight(keys=slice(9 * i, 9 * i + 5), by=1.2 + 0.2 * i, heads=[i]) for i in range(8))
OPERATOR_EDITS: dict[str, tuple[Edit, ...]] = {
    "one Reweight": EIGHT[:1],
    "eight at once": EIGHT,
    "Block, some queries": (regard.Block(keys=[5], queries=slice(100, None)),),
    "Temperature": (regard.Temperature(0.8, heads=[1, 2]),),
    "Redistribute": (regard.Redistribute([0], slice(1, 50), 0.5),),
    "Reweight as factor": (regard.Reweight([0], 0.5, renormalize=False),),
}
MODEL_EDITS: tuple[Edit, ...] = (
    regard.Reweight(keys=slice(20, 40), by=3, layers="*.[23].*"),
    regard.Bias(keys=[0], by=-1, heads=[1, 5]),
    regard.Gate(0.5, heads=[2], layers=4),
)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The usual way: the stored matrix, with the edit in an additive mask."""
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    mask = torch.zeros(1, HEADS, query.shape[2], key.shape[2], device=query.device, dtype=query.dtype)
    mask[:, 0, :, :5] = math.log(1.2)
    logits = query @ key.transpose(-1, -2) * WIDTH**-0.5 + mask.masked_fill(hidden, -math.inf)
    return logits.softmax(-1) @ value


def steered(query: Tensor, key: Tensor, value: Tensor, edits: Sequence[Edit]) -> Run:
    def run() -> Tensor:
        with regard.steer(None, *edits):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return run


def operator_table(length: int, device: str, repeats: int) -> Table:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = torch.randn(3, 1, HEADS, length, WIDTH, device=device).to(dtype).unbind()
    runs: dict[str, Run] = {"plain": lambda: scaled_dot_product_attention(query, key, value, is_causal=True)}
    runs |= {name: steered(query, key, value, edits) for name, edits in OPERATOR_EDITS.items()}
    runs["usual way, one edit"] = lambda: eager(query, key, value)
    with torch.no_grad():
        seconds, ratios = compare(runs, device, repeats)
    table = Table("edit", "ratio to plain SDPA", title=f"N = {length:,}, {device}, {dtype}")
    table.add_row("plain", f"{1000 * seconds:.1f} ms")
    for name in list(runs)[1:]:
        table.add_row(name, f"{ratios[name]:.2f}×")
    return table


def decode_table(width: int, layers: int, prompt: int, steps: int, device: str, rounds: int) -> Table:
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, vocab_size=8192,
        intermediate_size=11 * width // 4, max_position_embeddings=16384, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    ids = torch.randint(3, 8000, (1, prompt), device=device)

    def seconds_per_step(block: AbstractContextManager[object], implementation: str) -> float:
        model.set_attn_implementation(implementation)
        with block, torch.inference_mode():
            seen = model(ids, past_key_values=DynamicCache(config=config))
            token, cache = seen.logits[:, -1:].argmax(-1), seen.past_key_values
            return statistics.median(clock(lambda: model(token, past_key_values=cache), device) for _ in range(steps))

    runs: dict[str, Callable[[], float]] = {
        "plain": lambda: seconds_per_step(nullcontext(), "sdpa"),
        "three edits": lambda: seconds_per_step(regard.steer(model, *MODEL_EDITS), "sdpa"),
        "eager, unedited": lambda: seconds_per_step(nullcontext(), "eager"),
    }
    times = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    title = f"decoding after {prompt:,} tokens, Llama of {layers} layers, d = {width}"
    table = Table("run", "tokens/s", "ratio to plain", title=title)
    for name in runs:
        rate = statistics.median(1 / of[name] for of in times)
        table.add_row(name, f"{rate:.1f}", f"{statistics.median(of['plain'] / of[name] for of in times):.2f}×")
    return table


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter texts, fewer rounds")
    arguments = parser.parse_args()
    quick = arguments.quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt, steps, rounds = (256, 16, 3) if quick else (1024, 40, 9)
    with Report("steer", arguments.save, width=100) as report:
        report.show(operator_table(1024 if quick else 4096, device, 5 if quick else 15))
        for width, layers in ((512, 8), (1024, 16)):
            report.show(decode_table(width, layers, prompt, steps, device, rounds))


if __name__ == "__main__":
    main()
