"""What searches and edits have in common: the prompt that they are about, and the attention of a call's last query."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional

from regard.runtime import AttentionCall, Column, edited_map
from regard.tokens import AfterImage, Where, image_tokens

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Token ids (B, N), and which of them are an image's, real (not padding), and the question: text after the image.

    ``after`` are the question and all that is generated.
    """

    ids: Tensor
    image: Tensor
    real: Tensor
    question: Tensor
    after: Where


def read_prompt(model: Module, inputs: Inputs) -> Prompt:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"the inputs {', '.join(inputs) or 'nothing'}"
        raise ValueError(
            f"input_ids (batch, tokens) are needed to find the image, got {got}; pass what a processor returns"
        )
    image = image_tokens(model)(ids)
    if not bool(image.any(dim=1).all()):
        row = int((~image.any(dim=1)).nonzero()[0])
        wanted = ", ".join(map(str, image_tokens(model).ids))
        raise ValueError(f"text {row} of the batch has no image token ({wanted}) among its {ids.shape[1]} tokens")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(image) if mask is None else mask.bool()
    after = AfterImage(image_tokens(model).ids)
    starts = after(ids).int().argmax(dim=1)
    alike = bool((starts == starts[0]).all()) and int(starts[0]) > 0
    return Prompt(ids, image, real, after(ids) & real, slice(int(starts[0]), None) if alike else after)


def last_query(call: AttentionCall) -> AttentionCall:
    """The call of its last query alone, with the edits of its logits so far."""
    queries, keys, mask = call.query.shape[2], call.key.shape[2], call.attn_mask
    if mask is not None and mask.ndim > 1:
        mask = mask[..., -1:, :]
    if call.is_causal and queries < keys:
        mask = (torch.arange(keys, device=call.query.device) < queries)[None]
    return replace(
        call,
        query=call.query[:, :, -1:],
        attn_mask=mask,
        is_causal=False,
        place=replace(call.place, query_start=call.place.query_start + queries - 1),
        columns=tuple(replace(c, query=c.query[..., -1:]) for c in call.columns),
        factors=(),
        own=None,
        gate=None,
        added=None,
    )


def last_row(call: AttentionCall, heads: Tensor) -> Tensor:
    """(1, H|1, N) boolean: the last query of the chosen heads."""
    last = torch.arange(call.query.shape[2], device=heads.device) == call.query.shape[2] - 1
    return heads[None, :, None] & last


def masses(call: AttentionCall, *weights: Tensor) -> tuple[Tensor, ...]:
    """``Σ_j P_ij w_j`` for each of some weights (B|1, M) of the keys: (B, H, N) each."""
    attention = edited_map(call)
    columns = torch.stack(torch.broadcast_tensors(*weights), dim=-1)[:, None].to(attention.device, attention.dtype)
    return (attention @ columns).unbind(-1)


def add_to_last(call: AttentionCall, heads: Tensor, by: Tensor) -> AttentionCall:
    """The terms ``by`` (B, H, M) of the logits of the chosen heads' last query."""
    if call.query.shape[2] == 1 and not call.is_causal:  # a step of decoding: they fit into its mask
        return replace(call, attn_mask=_biased(call.attn_mask, (by * heads[:, None])[:, :, None].to(call.query.dtype)))
    number = call.query.shape[1]
    rows = last_row(call, heads).expand(-1, number, -1)
    one = torch.eye(number, dtype=torch.bool, device=rows.device)[:, None, :, None]
    columns = (Column((rows & one[head]).to(by.dtype), by[:, head]) for head in range(number))
    return replace(call, columns=(*call.columns, *columns))


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask + bias


def per_key(values: Tensor, call: AttentionCall) -> Tensor:
    """Numbers of a text's tokens (B|1, tokens) at the call's keys: (B|1, M), 0 for tokens that came later."""
    batch, end = call.query.shape[0], call.place.key_start + call.key.shape[2]
    if batch % values.shape[0]:
        raise ValueError(f"numbers for {values.shape[0]} texts do not fit {call.place.path}, whose batch is {batch}")
    values = functional.pad(values[:, :end], (0, max(end - values.shape[1], 0)))[:, call.place.key_start :]
    repeats = batch // values.shape[0] if values.shape[0] > 1 else 1  # the beams of one text follow one another
    return values.repeat_interleave(repeats, dim=0).to(call.query.device)
