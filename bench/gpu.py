"""What needs a GPU: kernels against their references first, then times, within eight minutes.

    python -m bench.gpu [--checks] [--minutes 8] [--save]

Every check runs on the GPU what the tests run on the processor, and compares it with the definition in float64. Prints one
table of errors, and one table for each measurement that there is time for. Exits with 1 where a check fails, and with 2
where there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from rich.table import Table
from tests.maps.reference import Call
from tests.steer.reference import dense
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from bench import cache, observe, scaling, steer
from bench.results import Report, command_line
from regard.mixers import catalogue, delta_rule, linear_attention
from regard.mixers.forms import Form

TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
KERNELS: tuple[Literal["auto", "fused", "tiled"], ...] = ("auto", "fused", "tiled")
EDITS = (
    regard.Reweight([0, 3], 4.0), regard.Bias(slice(2, 9), -1.5, heads=[1]), regard.Temperature(0.7, heads=[0]),
    regard.Redistribute([0], slice(1, 5), 0.5), regard.Gate(0.5, heads=[1]), regard.Block([5], queries=slice(8, None)),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What is computed, how far it may be from its reference, and the errors by part."""

    name: str
    tolerance: float
    errors: Callable[[], dict[str, float]]


def checks(device: str) -> Iterator[Check]:
    """All of them, those of kernels first."""
    for dtype, kernel, causal in product(TOLERANCES, KERNELS, (True, False)):
        kind = f"{str(dtype).removeprefix('torch.')}, {'causal' if causal else 'masked'}"
        errors = lambda d=dtype, k=kernel, c=causal: of_map(call(d, c, device), k)  # noqa: E731
        yield Check(f"AttentionMap, {kernel}, {kind}", TOLERANCES[dtype], errors)
    for causal in (True, False):
        yield Check(f"gradients, {'causal' if causal else 'masked'}", 2e-4, lambda c=causal: of_gradients(c, device))
    for dtype, edit in product(TOLERANCES, EDITS):
        name = f"steer, {type(edit).__name__}, {str(dtype).removeprefix('torch.')}"
        yield Check(name, TOLERANCES[dtype], lambda d=dtype, e=edit: of_edit(d, e, device))
    yield Check("watch of a model", 2e-4, lambda: of_watch(device))
    yield Check("compress, written tokens", 0.0, lambda: of_compress(device))
    if device == "cuda":
        yield from lightning()
        yield from of_fla(device)
    yield from of_masks(device)
    for name in catalogue.mixers():
        yield Check(f"mixer, {name}", 1e-3, lambda n=name: of_mixer(n, device))


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest number expected, or of 1; infinite where anything is no number."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = (found - expected).masked_fill(found == expected, 0.0).abs().max()
    return float(error / expected[expected.isfinite()].abs().max().clamp(min=1.0)) if error.isfinite() else math.inf


def call(dtype: torch.dtype, causal: bool, device: str, length: int = 300) -> Call:
    """Grouped heads of width 64; where it is not causal, an additive mask that hides some keys."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 4, length, 64, generator=generator).to(device, dtype)
    key = torch.randn(2, 2, length, 64, generator=generator).to(device, dtype)
    bias = torch.randn(2, 1, length, length, generator=generator)
    hidden = torch.rand(2, 1, length, length, generator=generator) > 0.7
    mask = None if causal else bias.masked_fill(hidden, -math.inf).to(device, dtype)
    return Call(query, key, mask, causal, None)


def on_cpu(of: Call) -> Call:
    """The definition is of the processor, whose float64 is exact enough and takes any mask."""
    mask = None if of.attn_mask is None else of.attn_mask.cpu()
    return Call(of.query.cpu(), of.key.cpu(), mask, of.is_causal, of.scale)


def of_map(of: Call, kernel: Literal["auto", "fused", "tiled"]) -> dict[str, float]:
    """What an AttentionMap answers against the stored matrix."""
    matrix, defined = on_cpu(of).matrix(), on_cpu(of)
    A = regard.AttentionMap(of.query, of.key, of.attn_mask, of.is_causal, enable_gqa=True, kernel=kernel)
    V = torch.randn(of.key.shape, generator=torch.Generator().manual_seed(1)).to(of.key)
    W = torch.randn(1, 4, of.query.shape[2], 3, generator=torch.Generator().manual_seed(2)).to(of.query)
    values = V.double().cpu().repeat_interleave(2, 1)
    return {
        "product": difference(A @ V, matrix @ values),
        "transposed": difference(A.T @ W, matrix.mT @ W.double().cpu()),
        "logsumexp": difference(A.logsumexp(), defined.logsumexp()),
        "entropy": difference(A.entropy(), defined.entropy()),
        "received": difference(A.received(), matrix.sum(2)),
        "mass": difference(A.mass({"some": [0, 7]})[..., 0], matrix[..., [0, 7]].sum(-1)),
        "rows": difference(A.rows([0, 150]), matrix[:, :, [0, 150]]),
        "pooled": difference(A.pool(3, 2).sum((-2, -1)), matrix.sum((-2, -1))),
    }


def of_gradients(causal: bool, device: str) -> dict[str, float]:
    """Of queries and keys, through product, logsumexp and received, against autograd through the stored matrix."""
    of = call(torch.float32, causal, device, 90)
    leaves = [of.query.requires_grad_(), of.key.requires_grad_()]
    A = regard.AttentionMap(of.query, of.key, of.attn_mask, causal, enable_gqa=True)
    found = torch.autograd.grad(
        (A @ of.key.detach()).sin().sum() + A.logsumexp().sum() + A.received().sin().sum(), leaves
    )
    defined = on_cpu(Call(of.query.detach(), of.key.detach(), of.attn_mask, causal, None))
    query, key = defined.query.double().requires_grad_(), defined.key.double().requires_grad_()
    exact = Call(query, key, defined.attn_mask, causal, None)
    matrix, values = exact.matrix(), key.detach().repeat_interleave(2, 1)
    total = (matrix @ values).sin().sum() + exact.logsumexp().sum() + matrix.sum(2).sin().sum()
    expected = torch.autograd.grad(total, [query, key])
    return {name: difference(*pair) for name, *pair in zip(("query", "key"), found, expected, strict=True)}


def of_edit(dtype: torch.dtype, edit: Any, device: str) -> dict[str, float]:
    """A steered call of the fused operator against the edit of the stored matrix."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 2, 130, 32, generator=generator).to(device, dtype).unbind()
    with regard.steer(None, edit):
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
    _, expected = dense(query.cpu(), key.cpu(), value.cpu(), None, True, [edit])
    return {"output": difference(output, expected)}


def of_watch(device: str) -> dict[str, float]:
    """Statistics of the bundled model against its own eager attention in float64."""
    model, _ = regard.mini()
    ids = torch.arange(3, 203)[None]
    exact = regard.mini()[0].double()
    exact.set_attn_implementation("eager")
    with torch.inference_mode():
        stored = exact(ids, output_attentions=True).attentions
        model.to(device)
        with regard.watch(model, regard.Entropy(), regard.Received(), regard.Mass({"sink": [0]})) as seen:
            model(ids.to(device))
    data, matrix = seen.dataset(), torch.stack(stored)
    expected = {
        "entropy": torch.special.entr(matrix).sum(-1), "received": matrix.sum(-2), "mass": matrix[..., :1],
    }  # fmt: skip
    return {name: difference(torch.from_numpy(data[name].values), part) for name, part in expected.items()}


def of_compress(device: str) -> dict[str, float]:
    """How many tokens, generated with half a cache, differ from those of the processor."""
    ids, written = torch.arange(3, 103)[None], []
    for where in ("cpu", device):
        model, _ = regard.mini()
        with torch.inference_mode(), regard.compress(model.to(where), regard.cache.SnapKV(budget=0.5, window=16)):
            prompt = ids.to(where)
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        written.append(output.cpu())
    return {"tokens": float((written[0] != written[1]).sum())}


def lightning() -> Iterator[Check]:
    """The Triton kernel, compiled, on the cases that the tests run under its interpreter."""
    cases = importlib.import_module("tests.mixers.linear.lightning_kernel_cases")
    for name, case in cases.CASES.items():
        tolerance = 2e-2 if case[-1] == torch.bfloat16 else 2e-4
        yield Check(f"lightning kernel, {name}", tolerance, lambda c=case: cases.errors(*c))
    yield Check("lightning kernel, other uses", 2e-4, cases.other_uses)


def of_fla(device: str) -> Iterator[Check]:
    """Kernels of flash-linear-attention through our functions, from a state and with gradients, against the recurrence."""
    if importlib.util.find_spec("fla") is None:
        print("flash-linear-attention is not installed: mixers do without its kernels, which were not checked.")
        return
    for name, dtype, tokens in product(
        ("delta rule", "gated delta rule", "GLA"), (torch.bfloat16, torch.float16), (2, 300)
    ):

        def errors(name: str = name, dtype: torch.dtype = dtype, tokens: int = tokens) -> dict[str, float]:
            generator = torch.Generator().manual_seed(6)
            query, key, value = (torch.randn(2, 3, tokens, 64, generator=generator).to(dtype) for _ in range(3))
            key = torch.nn.functional.normalize(key, dim=-1)
            logits = torch.randn(2, 3, tokens, 64, generator=generator)
            state = torch.randn(2, 3, 64, 64, generator=generator)
            beta, decay = logits[..., 0].sigmoid(), torch.nn.functional.logsigmoid(logits)

            def run(tensors: list[Tensor], form: Form) -> tuple[Tensor, Tensor]:
                *heads, before = tensors
                if name == "GLA":
                    return linear_attention(*heads, decay.to(before), before, form=form)
                gate = {"log_decay": decay[..., 1].to(before)} if name == "gated delta rule" else {}
                return delta_rule(*heads, beta.to(before), before, form=form, **gate)

            leaves = [part.to(device).requires_grad_() for part in (query, key, value, state)]
            exact = [part.double().requires_grad_() for part in (query, key, value, state)]
            (output, after), (expected, expected_after) = run(leaves, "chunked"), run(exact, "recurrent")
            found = torch.autograd.grad(output.float().sin().sum() + after.sin().sum(), leaves)
            slopes = torch.autograd.grad(expected.sin().sum() + expected_after.sin().sum(), exact)
            pairs = zip(("query", "key", "value", "from the state"), found, slopes, strict=True)
            errors = {"output": difference(output, expected), "state": difference(after, expected_after)}
            return errors | {part: difference(*of) for part, *of in pairs}

        kind = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
        yield Check(f"flash-linear-attention's {name}, {kind}", TOLERANCES[torch.bfloat16], errors)


def of_masks(device: str) -> Iterator[Check]:
    """Masks as rules against the same masks stored, forward and backward."""
    if importlib.util.find_spec("regard.masks") is None:
        return
    masks: Any = importlib.import_module("regard.masks")
    attention: Any = getattr(regard, "attention", None)
    rules = {
        "causal": masks.causal(), "window": masks.window(40, 0), "window, both ways": masks.window(20, 30),
        "prefix": masks.prefix(33) | masks.window(16, 0), "strided": masks.strided(16),
    }  # fmt: skip
    for (name, rule), dtype in product(rules.items(), (torch.float32, torch.bfloat16)):

        def errors(rule: Any = rule, dtype: torch.dtype = dtype) -> dict[str, float]:
            generator = torch.Generator().manual_seed(5)
            cpu = torch.randn(3, 1, 2, 700, 64, generator=generator).to(dtype)
            leaves = [part.to(device).requires_grad_() for part in cpu]
            exact = [part.double().requires_grad_() for part in cpu]
            output = attention(*leaves, mask=rule)
            expected = scaled_dot_product_attention(*exact, attn_mask=rule.dense(1, 2, 700, 700))
            found = torch.autograd.grad(output.float().sin().sum(), leaves)
            slopes = torch.autograd.grad(expected.sin().sum(), exact)
            pairs = zip(("query", "key", "value"), found, slopes, strict=True)
            return {"output": difference(output, expected)} | {part: difference(*of) for part, *of in pairs}

        yield Check(f"mask, {name}, {str(dtype).removeprefix('torch.')}", TOLERANCES[dtype], errors)


@torch.no_grad()
def of_mixer(name: str, device: str) -> dict[str, float]:
    """A layer that reads and then decodes, against itself on the processor in float64."""
    torch.manual_seed(0)
    mixer = catalogue.mixer_named(name)(32).eval()
    x = torch.randn(2, 70, 32)
    exact, state = mixer.double()(x[:, :-1].double())
    exact_step, _ = mixer.decode(x[:, -1].double(), state)
    mixer = mixer.float().to(device)
    output, state = mixer(x[:, :-1].to(device))
    step, _ = mixer.decode(x[:, -1].to(device), state)
    return {"read": difference(output, exact), "decoded": difference(step, exact_step)}


def checked(report: Report, device: str) -> list[str]:
    """Run every check, print the table, and name those that failed."""
    table, failed = Table("check", "largest error", "allowed", "", title=f"against float64, {device}"), []
    for check in checks(device):
        torch.manual_seed(0)
        try:
            errors = check.errors()
        except Exception as error:  # one kernel that does not run must not hide what the others do
            table.add_row(check.name, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}", "", "FAILED")
            failed.append(check.name)
            continue
        part = max(errors, key=lambda name: errors[name])
        right = errors[part] <= check.tolerance
        table.add_row(check.name, f"{errors[part]:.1e}, {part}", f"{check.tolerance:.0e}", "" if right else "FAILED")
        if not right:
            failed.append(check.name)
    report.show(table)
    return failed


def measurements(device: str) -> Iterator[Callable[[], Table]]:
    """The tables in the order of their weight, as others print them, at lengths for a GPU."""
    half = torch.bfloat16
    yield lambda: observe.operator_table([1024, 4096, 16384], device, half)
    yield lambda: steer.operator_table(4096, device, 15)
    yield lambda: observe.operator_table([4096, 16384], device, torch.float32)
    yield lambda: scaling.operator_table((2048, 8192, 32768), device, 5)
    yield lambda: observe.model_table(4096, device)
    yield lambda: steer.decode_table(1024, 16, 1024, 40, device, 5)
    yield lambda: cache.reading_table(4096, device, 5)
    yield lambda: cache.decoding_table(4096, device, 3)


def main() -> None:
    """Check, then measure as long as told."""
    began = time.monotonic()
    parser = command_line(__doc__)
    parser.add_argument("--checks", action="store_true", help="no times")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no more tables are begun")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU: torch.cuda.is_available() is False. Nothing was checked.", file=sys.stderr)
        sys.exit(2)
    with Report("gpu", arguments.save, width=130) as report:
        failed = checked(report, "cuda")
        left_out = 0
        for measure in () if arguments.checks else measurements("cuda"):
            if time.monotonic() - began > 60 * arguments.minutes:
                left_out += 1
                continue
            report.show(measure())
    if left_out:
        print(f"{left_out} tables were left out: {arguments.minutes:g} minutes were over.")
    if failed:
        print(f"{len(failed)} checks failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
