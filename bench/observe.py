"""What it costs to see: statistics beside plain attention and beside stored attention.

    python -m bench.observe [--quick] [--save]

Prints the time of plain SDPA and, as medians of ratios within one run, that of the attention output together with each
statistic; the memory that it adds; and a whole model with and without statistics. Uses a GPU when there is one, and then
has FlexAttention as one more column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import regard
from bench.measuring import Run, compare, extra_memory, in_fresh_process
from bench.results import Report, command_line

HEADS, WIDTH = 8, 64
EAGER_AT_MOST = 8192
SEGMENTS = {"sink": [0], "early": slice(1, 512), "late": slice(512, 1024)}


def tensors(length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, length, WIDTH, device=device, generator=generator).to(dtype).unbind()
    return query, key, value


def observed(query: Tensor, key: Tensor, value: Tensor, *questions: str) -> tuple[Tensor, ...]:
    """The attention output and the statistics named."""
    attention = regard.AttentionMap(query, key, is_causal=True)
    for question in questions:
        attention.expect(question, *([SEGMENTS] if question == "mass" else []))
    attention.expect("product", value)
    output = attention @ value
    ask: dict[str, Callable[[], Tensor]] = {
        "mass": lambda: attention.mass(SEGMENTS),
        "entropy": attention.entropy,
        "received": attention.received,
    }
    return output, *(ask[question]() for question in questions)


def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The usual way: the matrix stored, the three statistics read from it."""
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
    logits = (query @ key.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, -torch.inf)
    matrix = logits.softmax(-1)
    entropy = -(matrix * matrix.clamp_min(1e-30).log()).sum(-1)
    mass = torch.stack([matrix[..., 0], matrix[..., 1:512].sum(-1), matrix[..., 512:1024].sum(-1)], -1)
    return matrix @ value, entropy, matrix.sum(2), mass


def operator_table(lengths: list[int], device: str, dtype: torch.dtype) -> Table:
    table = Table(title=f"attention output and statistics, as a multiple of plain SDPA ({device}, {dtype}, causal)")
    extra = ["FlexAttention"] if device == "cuda" else []
    for column in ("N", "SDPA, ms", "+ mass", "+ entropy", "+ received", "all three", "stored", *extra):
        table.add_column(column, justify="right")
    for length in lengths:
        query, key, value = tensors(length, device, dtype)
        runs: dict[str, Run] = {
            "plain": lambda q=query, k=key, v=value: scaled_dot_product_attention(q, k, v, is_causal=True),
            "mass": lambda q=query, k=key, v=value: observed(q, k, v, "mass"),
            "entropy": lambda q=query, k=key, v=value: observed(q, k, v, "entropy"),
            "received": lambda q=query, k=key, v=value: observed(q, k, v, "received"),
            "all": lambda q=query, k=key, v=value: observed(q, k, v, "mass", "entropy", "received"),
        }
        if length <= EAGER_AT_MOST:
            runs["stored"] = lambda q=query, k=key, v=value: eager(q, k, v)
        if device == "cuda":
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
            flex = torch.compile(flex_attention)
            runs["flex"] = lambda q=query, k=key, v=value, m=mask, f=flex: f(q, k, v, block_mask=m)
        with torch.no_grad():
            seconds, ratios = compare(runs, device, repeats=9 if length <= 4096 else 5 if length <= 8192 else 3)
        cells = [f"{ratios[name]:.2f}×" if name in ratios else "–" for name in (*list(runs)[1:5], "stored")]
        cells += [f"{ratios['flex']:.2f}×"] if device == "cuda" else []
        table.add_row(f"{length:,}", f"{1000 * seconds:.1f}", *cells)
    return table


@torch.no_grad()
def operator_memory(length: int, device: str, stored: bool) -> float:
    query, key, value = tensors(256, device, torch.float32)
    observed(query, key, value, "entropy", "received")  # what is allocated once does not count
    query, key, value = tensors(length, device, torch.float32)
    if stored:
        return extra_memory(lambda: eager(query, key, value), device)
    return extra_memory(lambda: observed(query, key, value, "mass", "entropy", "received"), device)


def memory_table(lengths: list[int], device: str) -> Table:
    table = Table(title=f"memory beyond the inputs, output and three statistics ({device}, float32)")
    for column in ("N", "regard, MB", "stored, MB", "one stored matrix, MB"):
        table.add_column(column, justify="right")
    for length in lengths:
        seen = in_fresh_process(operator_memory, length, device, False)
        stored = in_fresh_process(operator_memory, length, device, True) if length <= EAGER_AT_MOST else None
        matrix = HEADS * length**2 * 4
        cells = [f"{seen / 1e6:,.0f}", "–" if stored is None else f"{stored / 1e6:,.0f}", f"{matrix / 1e6:,.0f}"]
        table.add_row(f"{length:,}", *cells)
    return table


def llama(device: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1376,
        vocab_size=2048,
        max_position_embeddings=32768,
    )
    return LlamaModel(config).eval().to(device)


def model_runs(length: int, device: str) -> dict[str, Run]:
    model = llama(device)
    ids = torch.randint(0, 2048, (1, length), device=device)

    def plain() -> object:
        model.set_attn_implementation("sdpa")
        return model(input_ids=ids, use_cache=False)

    def watched(share: bool = True) -> object:
        model.set_attn_implementation("sdpa")
        three = regard.Entropy(), regard.Received(), regard.Mass(SEGMENTS)
        with regard.watch(model, *three, share=share):
            return model(input_ids=ids, use_cache=False)

    def stored() -> object:
        model.set_attn_implementation("eager")
        return model(input_ids=ids, use_cache=False, output_attentions=True)

    return {"plain": plain, "watched": watched, "bit for bit": lambda: watched(share=False), "stored": stored}


@torch.no_grad()
def model_memory(length: int, device: str, name: str) -> float:
    model_runs(256, device)["plain"]()
    return extra_memory(model_runs(length, device)[name], device)


def model_table(length: int, device: str) -> Table:
    table = Table(title=f"Llama of 8 layers, d = 512, 8 heads, at N = {length:,} ({device}, float32)")
    for column in ("", "seconds", "× plain", "peak beyond the model, MB"):
        table.add_column(column, justify="right")
    runs = model_runs(length, device)
    with torch.no_grad():
        seconds, ratios = compare(runs, device, repeats=5)
    titles = {
        "plain": "plain forward pass",
        "watched": "with Entropy, Received and Mass on every layer",
        "bit for bit": "the same with share=False",
        "stored": "output_attentions=True",
    }
    for name, title in titles.items():
        memory = in_fresh_process(model_memory, length, device, name)
        table.add_row(title, f"{seconds * ratios[name]:.2f}", f"{ratios[name]:.2f}", f"{memory / 1e6:,.0f}")
    return table


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="N up to 4,096 and no whole model")
    arguments = parser.parse_args()
    quick = arguments.quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [1024, 2048, 4096] if quick else [1024, 2048, 4096, 8192, 16384, 32768]
    with Report("observe", arguments.save, width=110) as report:
        report.console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, H = {HEADS}, D = {WIDTH}")
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            report.show(operator_table(lengths, device, dtype))
        report.show(memory_table(lengths[-3:], device))
        if not quick:
            report.show(model_table(4096, device))


if __name__ == "__main__":
    main()
