"""The reference kernel: the whole matrix, in float64, as the definition has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.maps._request import Answer, Request, segments_as_values, segments_from_values
from regard.maps._scores import Scores


def evaluate(scores: Scores, request: Request) -> Answer:
    """Answer the request from the stored N×M matrix."""
    asked, request = request, segments_as_values(scores, request)
    *_, queries, keys = scores.shape
    device = scores.query.device
    logits = scores.logits(torch.arange(queries, device=device), torch.arange(keys, device=device), torch.float64)
    # What is hidden is taken out before the logarithms, where −inf · 0 would make gradients NaN.
    hidden = logits.isneginf()
    blind = hidden.all(dim=-1)
    logsumexp = logits.masked_fill(blind[..., None], 0.0).logsumexp(dim=-1)
    matrix = probabilities(logits)
    forward = transposed = received = entropy = None
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
    logsumexp = logsumexp.masked_fill(blind, -math.inf)
    return segments_from_values(asked, Answer(logsumexp.to(request.dtype), forward, transposed, received, entropy))


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of −inf alone gives zeros."""
    hidden = logits.isneginf().all(dim=-1, keepdim=True)
    return torch.softmax(logits.masked_fill(hidden, 0.0), dim=-1).masked_fill(hidden, 0.0)
