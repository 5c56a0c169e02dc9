"""Heads by layer and number, and the search that tries them one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall
from regard.steer import steer
from regard.steer.custom import Custom
from regard.steer.language.example import Edits, Example, Measure, Progress, mean_measure, next_logits

Head = tuple[int, int]


def only(heads: Iterable[Head] | None) -> dict[str, Any]:
    """``layers=`` and ``heads=`` of an edit of these heads, (layer, head) each, and of no others; None for all.

    >>> only([(2, 0), (1, 3), (2, 5)])
    {'layers': [1, 2], 'heads': {1: [3], 2: [0, 5]}}
    """
    if heads is None:
        return {}
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        by_layer.setdefault(int(layer), []).append(int(head))
    if not by_layer:
        raise ValueError("no heads were chosen; pass pairs (layer, head), or None for every head")
    return {"layers": list(by_layer), "heads": by_layer}


def best_heads(*scores: Mapping[Head, float], top: int) -> list[Head]:
    """The heads that are among the best in every one of several scores, by their mean rank.

    >>> best_heads({(0, 0): 0.9, (0, 1): 0.5, (1, 0): 0.7}, {(0, 0): 0.2, (0, 1): 0.1, (1, 0): 0.6}, top=2)
    [(0, 0), (1, 0)]
    """
    if not scores or top < 1:
        raise ValueError(f"best_heads needs scores and a top of at least 1, got {len(scores)} scores and top={top}")
    ranked = [sorted(of, key=of.__getitem__, reverse=True) for of in scores]
    common = set.intersection(*(set(ranking[:top]) for ranking in ranked))
    if not common:
        raise ValueError(f"no head is among the best {top} in all of {len(scores)} scores; choose a larger top")
    return sorted(common, key=lambda head: (sum(ranking.index(head) for ranking in ranked), head))


def every_head(model: Module, token_ids: Sequence[int] | Tensor) -> list[Head]:
    """All heads of a model, in order, found by running it once."""
    numbers: dict[int, int] = {}

    def count(call: AttentionCall, heads: Tensor) -> AttentionCall:
        numbers[call.place.layer] = call.query.shape[1]
        return call

    with torch.no_grad(), steer(model, Custom(count)):
        next_logits(model, token_ids)
    return [(layer, head) for layer, number in sorted(numbers.items()) for head in range(number)]


def score_each(
    model: Module,
    examples: Sequence[Example],
    measure: Measure,
    edits: Callable[[Head], Edits],
    heads: Sequence[Head],
    progress: Progress | None = None,
) -> dict[Head, float]:
    """The measure's mean with the edits of each head alone."""
    scores: dict[Head, float] = {}
    for number, head in enumerate(heads):
        scores[head] = mean_measure(model, examples, measure, edits(head))
        if progress is not None:
            progress(number + 1, len(heads))
    return scores
