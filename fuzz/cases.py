"""Calls of attention drawn from a seed: any batch, grouped heads, lengths, widths, masks, dtypes and layouts."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from tests.maps.reference import Call
from torch import Tensor

import regard
from regard.steer import Edit

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}


def laid_out(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers as models hand them over: in one piece, transposed, every second one, expanded or flipped."""
    batch, heads, length, width = shape
    match draw.choice(("plain", "transposed", "strided", "expanded", "flipped")):
        case "transposed":
            return torch.randn(batch, length, heads, width).transpose(1, 2)
        case "strided":
            return torch.randn(batch, heads, length, 2 * width)[..., ::2]
        case "expanded":
            return torch.randn(1, heads, length, width).expand(shape)
        case "flipped":
            return torch.randn(shape).mT.contiguous().mT
    return torch.randn(shape)


def call(draw: random.Random, dtypes: tuple[torch.dtype, ...] = DTYPES, longest: int = 200) -> Call:
    """A call that scaled_dot_product_attention takes, with ``enable_gqa``."""
    batch, key_heads, groups = draw.randint(1, 3), draw.randint(1, 3), draw.choice((1, 1, 2, 3))
    queries, keys = (draw.choice((1, draw.randint(1, 20), draw.randint(1, longest))) for _ in range(2))
    width, dtype = draw.choice((1, 2, 7, 8, 16, 33, 64)), draw.choice(dtypes)
    size = draw.choice((0.0, 0.1, 1.0, 1.0, 4.0))
    query = (size * laid_out(draw, (batch, key_heads * groups, queries, width))).to(dtype)
    key = laid_out(draw, (batch, key_heads, keys, width)).to(dtype)
    kind = draw.choice(("none", "causal", "boolean", "additive"))
    return Call(query, key, mask(draw, kind, query, keys), kind == "causal", draw.choice((None, None, 0.05, 0.7)))


def mask(draw: random.Random, kind: str, query: Tensor, keys: int) -> Tensor | None:
    """A mask of any shape that broadcasts, some rows of which may hide every key."""
    if kind not in ("boolean", "additive"):
        return None
    full = (query.shape[0], query.shape[1], query.shape[2], keys)
    shape = [draw.choice((1, length)) for length in full][draw.randint(0, 2) :]
    seen = torch.rand(shape) > draw.choice((0.0, 0.3, 0.9))
    if kind == "boolean":
        return seen
    return torch.where(seen, torch.randn(shape), -math.inf).to(query.dtype)


def place(draw: random.Random, length: int) -> Any:
    """Positions in any writing that edits take."""
    match draw.choice(("index", "list", "slice", "mask")):
        case "index":
            return draw.randrange(-length, length)
        case "list":
            chosen = draw.sample(range(length), draw.randint(1, min(4, length)))
            return [position - draw.choice((0, length)) for position in chosen]
        case "slice":
            start = draw.randrange(length)
            return slice(start, draw.randint(start + 1, length))
    marked = [draw.random() < 0.5 for _ in range(length)]
    return torch.tensor(marked if any(marked) else [True] * length)


def edit(draw: random.Random, heads: int, queries: int, keys: int) -> Edit:
    """Any edit whose meaning on the stored matrix is written in tests/steer/reference.py."""
    chosen = draw.choice((None, sorted(draw.sample(range(heads), draw.randint(1, heads)))))
    rows = draw.choice((None, place(draw, queries)))
    kinds = ("reweight", "remove", "factor", "block", "bias", "temperature", "gate", "uniform", "redistribute")
    match draw.choice(kinds if keys > 1 else kinds[:-1]):
        case "reweight":
            return regard.Reweight(place(draw, keys), draw.uniform(0.05, 8), rows, heads=chosen)
        case "remove":
            return regard.Reweight(place(draw, keys), 0, rows, heads=chosen)
        case "factor":
            return regard.Reweight(place(draw, keys), draw.uniform(0, 3), rows, renormalize=False, heads=chosen)
        case "block":
            return regard.Block(place(draw, keys), rows, heads=chosen)
        case "bias":
            return regard.Bias(place(draw, keys), draw.uniform(-5, 5), rows, heads=chosen)
        case "temperature":
            return regard.Temperature(draw.uniform(0.5, 3), rows, heads=chosen)
        case "gate":
            return regard.Gate(draw.uniform(-2, 2), rows, heads=chosen)
        case "redistribute":
            cut = draw.randint(1, keys - 1)
            return regard.Redistribute(slice(0, cut), range(cut, keys), draw.uniform(0, 1), rows, heads=chosen)
    return regard.ReplaceMap("uniform", rows, heads=chosen)


def agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise where numbers are further apart than the tolerance, absolutely and as a share of the largest."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not found.numel():
        return
    error = (found - expected).masked_fill(found == expected, 0.0).abs()
    allowed = tolerance * expected.masked_fill(~expected.isfinite(), 0.0).abs().max().clamp(min=1.0)
    if not bool((error <= allowed).all()):
        raise AssertionError(f"{what}: off by {float(error.max()):.2e}, allowed {float(allowed):.2e}")
