"""The reference kernel: the whole matrix, in float64, as the definition has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.maps._request import (
    Answer,
    Request,
    blocks_as_values,
    blocks_from_values,
    segments_as_values,
    segments_from_values,
)
from regard.maps._scores import Scores


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request from the stored N×M matrix."""
    asked, request = request, segments_as_values(scores, blocks_as_values(scores, request))
    *_, queries, keys = scores.shape
    device = scores.query.device
    logits = scores.logits(torch.arange(queries, device=device), torch.arange(keys, device=device), torch.float64)
    # What is hidden is taken out before the logarithms, where −inf · 0 would make gradients NaN.
    sinks = None if scores.sinks is None else scores.sinks.double().expand(scores.shape[:3])
    every = with_sinks(logits, sinks)
    hidden, blind = logits.isneginf(), every.isneginf().all(dim=-1)
    logsumexp = every.masked_fill(blind[..., None], 0.0).logsumexp(dim=-1)
    matrix = probabilities(logits, sinks)
    forward = transposed = received = entropy = distance = None
    if request.values is not None:
        values = request.values.double()
        forward = (matrix @ values.repeat_interleave(matrix.shape[1] // values.shape[1], dim=1)).to(request.dtype)
    if request.weights is not None:
        transposed = (matrix.transpose(-1, -2) @ request.weights.double()).to(request.dtype)
    if request.received is not None:
        received = (matrix * request.received.double().unsqueeze(-1)).sum(dim=-2).to(request.dtype)
    if request.entropy:
        surprise = (logsumexp[..., None] - logits).masked_fill(hidden, 0.0)
        entropy = (matrix * surprise).sum(dim=-1).to(request.dtype)
    if request.distance is not None:
        rows, columns = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
        distance = (matrix * (rows + request.distance - columns).abs()).sum(dim=-1).to(request.dtype)
    logsumexp = logsumexp.masked_fill(blind, -math.inf)
    answer = Answer(logsumexp.to(request.dtype), forward, transposed, received, entropy, distance=distance)
    return blocks_from_values(asked, segments_from_values(blocks_as_values(scores, asked), answer))


def with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Rows of logits with their sink, (B, Hq, N), as one more, the last."""
    return logits if sinks is None else torch.cat([logits, sinks.unsqueeze(-1)], dim=-1)


def probabilities(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last dimension, beside the sinks (B, Hq, N); a row of −inf alone gives zeros."""
    every = with_sinks(logits, sinks)
    hidden = every.isneginf().all(dim=-1, keepdim=True)
    matrix = torch.softmax(every.masked_fill(hidden, 0.0), dim=-1).masked_fill(hidden, 0.0)
    return matrix[..., : logits.shape[-1]]
