"""Which kernel evaluates a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from regard.maps import _blocked, _dense, _flex, _fused, _stored, _tiled
from regard.maps._request import ALIGNMENT, Answer, RefusedError, Request, blocks_as_values, blocks_from_values
from regard.maps._scores import Scores

# From this many keys on, on a CPU, masses are better carried by the fused operator than summed in strips.
_LONG = 8192

KernelName = Literal["auto", "dense", "tiled", "fused", "blocked"]


def check_kernel(name: str, has_rule: bool = False) -> None:
    """Refuse a name that is none of the kernels', or of a kernel that knows no rules."""
    if name not in get_args(KernelName):
        raise ValueError(f"kernel must be one of {', '.join(get_args(KernelName))}, got {name!r}")
    if has_rule and name in ("tiled", "fused"):
        raise ValueError(f"the {name} kernel visits every pair; with mask= use auto, blocked or dense")


def evaluate(scores: Scores, request: Request, kernel: KernelName) -> Answer:
    """Evaluate with the kernel named; a fused operator that is missing or refuses gives way to the tiled kernel.

    Pictures and distances are read from strips in passing. Other kernels have pictures from a product with more values, and
    distances from a pass of their own.
    """
    device = scores.query.device.type
    if torch.is_autocast_enabled(device):  # it would run the products in half precision, and so the statistics
        with torch.autocast(device, enabled=False):
            return evaluate(scores, request, kernel)
    if kernel == "dense" or 0 in scores.shape:
        return _dense.evaluate(scores, request)
    if kernel in ("auto", "tiled") and device == "cpu" and scores.rule is None and _reads_strips(request):
        read_by = _stored.answer if kernel == "auto" and _stored.serves(scores, request) else _tiled.evaluate
        return read_by(scores, request)
    if request.distance is not None:
        distance = _tiled.evaluate(scores, Request(request.dtype, distance=request.distance)).distance
        return replace(evaluate(scores, replace(request, distance=None), kernel), distance=distance)
    if request.blocks is not None:
        return blocks_from_values(request, evaluate(scores, blocks_as_values(scores, request), kernel))
    if kernel == "blocked" or scores.rule is not None:
        if kernel == "auto" and _flex.serves(scores, request):
            return _flex.evaluate(scores, request)
        return _blocked.evaluate(scores, request)
    if kernel == "fused" or (kernel == "auto" and _fused_serves(scores, request)):
        try:
            return _fused.evaluate(scores, request)
        except RefusedError:
            pass
    if kernel == "auto" and _stored.serves(scores, request):
        return _stored.answer(scores, request)
    return _tiled.evaluate(scores, request)


def _reads_strips(request: Request) -> bool:
    return request.blocks is not None or request.distance is not None


def _fused_serves(scores: Scores, request: Request) -> bool:
    """Where the fused operator is the faster one.

    On a CPU that is the product with values as wide as the heads, in long texts together with masses: every other question
    costs it wider tensors, a second call or a copy of the mask, while a strip answers it in passing. On a GPU it nearly
    always is.
    """
    if scores.query.device.type != "cpu":
        return scores.query.device.type == "cuda"
    other_questions = request.entropy or request.weights is not None or request.received is not None
    if request.values is None or other_questions or scores.mask is not None:
        return False
    width, head_dim = request.values.shape[-1], scores.query.shape[-1]
    few_masses = len(request.segments) <= (ALIGNMENT if scores.shape[3] >= _LONG else 0)
    return head_dim // 2 <= width <= head_dim and few_masses
