"""AttentionMap against the stored matrix in float64, on every kernel.

python -m fuzz.maps [--minutes 5] [--seed SEED]
"""

from __future__ import annotations

import random

import torch

import regard
from fuzz.cases import TOLERANCES, agree, call
from fuzz.drawing import main


def answers(draw: random.Random) -> str:
    """Every question about one map, announced together or asked alone."""
    of, kernel = call(draw), draw.choice(("auto", "dense", "tiled", "fused"))
    matrix, dtype = of.matrix(), of.query.dtype
    batch, heads, queries, keys = matrix.shape
    A = regard.AttentionMap(
        of.query, of.key, of.attn_mask, of.is_causal, scale=of.scale, enable_gqa=True, kernel=kernel
    )
    V = torch.randn(batch, of.key.shape[1], keys, draw.randint(1, 40)).to(dtype)
    W = torch.randn(batch, heads, queries, 3).to(dtype)
    segments = {"first": [0], "some": sorted({draw.randrange(keys) for _ in range(3)})}
    if draw.random() < 0.5:
        for question in ("entropy", "received"):
            A.expect(question)
        A.expect("mass", segments)
        A.expect("product", V)
    # Statistics are kept in float32 at least: they are as exact in half precision as the inputs are.
    exact = 1e-10 if dtype == torch.float64 else 1e-3 if dtype in (torch.bfloat16, torch.float16) else 5e-5
    repeated = V.double().repeat_interleave(heads // of.key.shape[1], 1)
    agree(A @ V, matrix @ repeated, TOLERANCES[dtype], f"{kernel} product")
    agree(A.T @ W, matrix.mT @ W.double(), TOLERANCES[dtype] * queries**0.5, f"{kernel} transposed product")
    agree(A.entropy(), of.entropy(), exact, f"{kernel} entropy")
    agree(A.received(), matrix.sum(2), exact, f"{kernel} received")
    mass = torch.stack([matrix[..., columns].sum(-1) for columns in segments.values()], -1)
    agree(A.mass(segments), mass, exact, f"{kernel} mass")
    agree(A.logsumexp(), of.logsumexp(), exact, f"{kernel} logsumexp")
    row, column = draw.randrange(queries), draw.randrange(keys)
    agree(A.rows([row]), matrix[:, :, [row]], exact, "rows")
    agree(A.tile([row], slice(0, column + 1)), matrix[:, :, [row], : column + 1], exact, "tile")
    agree(A.topk(1).shares[..., 0], matrix.amax(-1), exact, "largest")
    agree(A.pool(1, 1)[..., 0, 0], matrix.sum((-2, -1)), exact * queries**0.5, "pooled")
    return f"{kernel}, {dtype}, {tuple(matrix.shape)}"


def gradients(draw: random.Random) -> str:
    """Of products, logsumexp and received, against autograd through the stored matrix."""
    of = call(draw, (torch.float64,), longest=40)
    kernel = draw.choice(("auto", "tiled", "fused"))
    query, key = (part.contiguous().requires_grad_() for part in (of.query, of.key))
    of.query, of.key = query, key
    V = torch.randn(*key.shape[:3], 4, dtype=torch.float64)
    A = regard.AttentionMap(query, key, of.attn_mask, of.is_causal, scale=of.scale, enable_gqa=True, kernel=kernel)
    found = torch.autograd.grad((A @ V).sin().sum() + A.received().sin().sum(), (query, key))
    # The definition has no gradient where a row sees nothing: a row of the matrix is nothing there, whatever it is made of.
    logits = of.logits()
    blind = logits.isneginf().all(-1, keepdim=True)
    matrix = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    repeated = V.repeat_interleave(query.shape[1] // key.shape[1], 1)
    expected = torch.autograd.grad((matrix @ repeated).sin().sum() + matrix.sum(2).sin().sum(), (query, key))
    for name, one, other in zip(("query", "key"), found, expected, strict=True):
        agree(one, other, 1e-8, f"{kernel} gradient of {name}")
    return f"{kernel}, {tuple(matrix.shape)}"


CHECKS = {"answers": answers, "gradients": gradients}

if __name__ == "__main__":
    main("fuzz.maps", __doc__, CHECKS)
