"""Edits of what heads put out, for rules that add to it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from regard.runtime import AttentionCall


def with_output(call: AttentionCall, heads: Tensor, output: Tensor) -> AttentionCall:
    """The call whose chosen heads put out ``output`` (B, H, N, Dv), as values of the queries' own; the others as before.

    Edits of the logits that come later do nothing to these heads.
    """
    first, queries, keys = call.place.query_start - call.place.key_start, call.query.shape[2], call.key.shape[2]
    if first < 0 or first + queries > keys:
        raise ValueError(
            f"outputs can be replaced where queries are among the keys; {call.place.path} has {queries} queries from "
            f"position {call.place.query_start} on and {keys} keys from {call.place.key_start} on. Choose "
            "other layers with layers="
        )
    number = call.query.shape[1]
    key, value = (tensor.repeat_interleave(number // tensor.shape[1], dim=1) for tensor in (call.key, call.value))
    held = functional.pad(output, (0, 0, first, keys - first - queries)).to(value.dtype)
    rows = heads[None, :, None]
    gate = None if call.gate is None else torch.where(rows, torch.ones_like(call.gate), call.gate)
    return replace(
        call,
        key=key,
        value=torch.where(rows[..., None], held, value),
        enable_gqa=False,
        own=rows if call.own is None else call.own | rows,
        gate=gate,
    )
