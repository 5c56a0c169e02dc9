"""Calls of scaled_dot_product_attention of odd kinds, watched and steered.

python -m fuzz.calls [--minutes 5] [--seed SEED]
"""

from __future__ import annotations

import random
from contextlib import nullcontext

import torch
from tests.maps.reference import Call
from tests.steer.reference import dense
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from fuzz.cases import TOLERANCES, agree, call, edit
from fuzz.drawing import main


def run(of: Call, value: Tensor) -> Tensor:
    """The call, as a model makes it."""
    return scaled_dot_product_attention(
        of.query, of.key, value, attn_mask=of.attn_mask, is_causal=of.is_causal, scale=of.scale, enable_gqa=True
    )


def watched(draw: random.Random) -> str:
    """Seeing changes nothing, and what is seen is what was."""
    of = call(draw)
    value, matrix, dtype = torch.randn_like(of.key), of.matrix(), of.query.dtype
    plain = run(of, value)
    shares = draw.random() < 0.5
    inference = torch.inference_mode() if draw.random() < 0.5 else nullcontext()
    with inference, regard.watch(regard.Entropy(), regard.Received(), regard.Mass({"sink": [0]}), share=shares) as seen:
        output = run(of, value)
    if shares:
        seeing = ~of.logsumexp().isneginf()  # SDPA has no answer for rows that see nothing
        agree(output[seeing], plain[seeing], TOLERANCES[dtype], "output")
    elif not torch.equal(output.nan_to_num(), plain.nan_to_num()):
        raise AssertionError("share=False: the output is not that of the plain call, bit for bit")
    data, exact = seen.dataset(), 1e-3 if dtype in (torch.bfloat16, torch.float16) else 5e-5
    agree(torch.tensor(data.entropy[0].values), of.entropy(), exact, "entropy")
    agree(torch.tensor(data.received[0].values), matrix.sum(2), exact, "received")
    agree(torch.tensor(data.mass[0, ..., 0].values), matrix[..., 0], exact, "mass")
    return f"{dtype}, {tuple(matrix.shape)}, share={shares}"


def steered(draw: random.Random) -> str:
    """Edits, alone and after others, mean what they mean on the stored matrix."""
    of = call(draw)
    of.scale = None
    value, dtype = torch.randn_like(of.key), of.query.dtype
    heads, queries, keys = of.query.shape[1], of.query.shape[2], of.key.shape[2]
    if of.is_causal and queries != keys:
        of.is_causal = False
    made = [edit(draw, heads, queries, keys) for _ in range(draw.randint(1, 4))]
    _, expected = dense(of.query, of.key, value, of.attn_mask, of.is_causal, made)
    with regard.steer(None, *made):
        output = run(of, value)
    agree(output, expected, TOLERANCES[dtype], f"{made}")
    return f"{dtype}, {made}"


CHECKS = {"watched": watched, "steered": steered}

if __name__ == "__main__":
    main("fuzz.calls", __doc__, CHECKS)
