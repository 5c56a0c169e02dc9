"""FlexAttention: the compiled operator that skips a mask's empty tiles on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from regard.maps._request import Answer, Request
from regard.maps._scores import Scores

Attend = Callable[..., Any]


def serves(scores: Scores, request: Request) -> bool:
    """Whether the request is plain attention on a CUDA device: values alone, under a rule alone."""
    other_questions = request.entropy or request.segments or request.weights is not None or request.received is not None
    return (
        scores.query.is_cuda
        and scores.mask is None
        and scores.softcap is None
        and scores.sinks is None
        and request.values is not None
        and not other_questions
        and request.dtype != torch.float64
    )


def evaluate(scores: Scores, request: Request, attend: Attend | None = None) -> Answer:
    """``P values`` and the log-sum-exp, differentiable; by FlexAttention compiled, or by the ``attend`` given."""
    if scores.rule is None or request.values is None:
        raise ValueError("FlexAttention is asked for the product with values under a rule")
    query, key = scores.query.to(request.dtype), scores.key.to(request.dtype)
    values = request.values.to(request.dtype)
    if values.shape[1] != key.shape[1]:
        key = key.repeat_interleave(values.shape[1] // key.shape[1], dim=1)
    block_mask = scores.rule.block_mask(*scores.shape, device=query.device)
    output, logsumexp = (attend or _compiled())(
        query,
        key,
        values,
        block_mask=block_mask,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
    )
    wide = torch.promote_types(request.dtype, torch.float32)
    return Answer(logsumexp.to(wide), output.to(wide))


@cache
def _compiled() -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
