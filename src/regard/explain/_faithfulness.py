"""Is an explanation true? What a model says without the tokens that it names, and with them alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain.explanation import Inputs, run
from regard.steer import Block, steer
from regard.steer.metrics import Metric
from regard.tokens import Where, resolve


@dataclass(frozen=True)
class Faithfulness:
    """The metric as tokens are hidden, from the one that an explanation ranks highest to the lowest.

    ``shares`` (steps + 1,) are those of a text's tokens that were hidden, or shown; ``deletion`` and ``insertion``, both
    (steps + 1, batch), the metric with so many of the highest hidden, and with only so many of them shown.

    A true explanation makes the metric fall early as tokens are hidden, and rise early as they are shown.

    >>> found = Faithfulness(torch.tensor([0.0, 0.5, 1.0]), *torch.tensor([[[4.0], [1.0], [0.0]], [[0.0], [3.0], [4.0]]]))
    >>> found.deletion_area, found.insertion_area
    (tensor([1.5000]), tensor([2.5000]))
    >>> found.comprehensiveness, found.sufficiency
    (tensor([3.5000]), tensor([0.5000]))
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """(batch,): the area under the curve of hiding; the lower the truer. V. Petsiuk et al. (2018), RISE."""
        return torch.trapezoid(self.deletion, self.shares.to(self.deletion), dim=0)

    @property
    def insertion_area(self) -> Tensor:
        """(batch,): the area under the curve of showing; the higher the truer."""
        return torch.trapezoid(self.insertion, self.shares.to(self.insertion), dim=0)

    @property
    def comprehensiveness(self) -> Tensor:
        """(batch,): how far the metric falls without the highest tokens, a mean over the shares: the AOPC.

        J. DeYoung et al. (2020), ERASER; W. Samek et al. (2017), Evaluating the Visualization of What a Deep Neural Network
        Has Learned.
        """
        return (self.deletion[0] - self.deletion[1:]).mean(0)

    @property
    def sufficiency(self) -> Tensor:
        """(batch,): how far it stays below with the highest tokens alone, a mean over the shares; 0 where they suffice."""
        return (self.insertion[-1] - self.insertion[1:]).mean(0)


def faithfulness(
    model: Module,
    inputs: Inputs,
    scores: Tensor,
    metric: Metric,
    *,
    steps: int = 10,
    keep: Where = -1,
    token_mask: Tensor | None = None,
) -> Faithfulness:
    """Hide tokens from all attention in the order of an explanation, and measure what the model then says.

    A hidden token is a key that no query sees, in any layer: nothing is put in its place, and positions stay as they were, so
    that the model reads no text that was never written. 2 · steps passes of the model.

    Args:
        model: as for `regard.steer`, in evaluation mode; it mixes tokens by attention alone.
        inputs: its arguments by name, or its one tensor.
        scores: (batch, tokens), as an `Explanation` makes them.
        metric: as for `regard.sweep`, one number for each text, such as `regard.logit_difference`.
        steps: into how many shares the tokens are cut.
        keep: positions that are always shown, and not counted: by default the last, at which a language model speaks.
        token_mask: (batch, tokens), nonzero for real tokens, as a tokenizer's ``attention_mask``.

    Raises:
        ValueError: scores or a mask of another shape, or NaN; no steps; a metric of another shape than (batch,).

    >>> import torch, regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is 4", return_tensors="pt")
    >>> metric = regard.logit_difference(*tokenizer.convert_tokens_to_ids(["8", "7"]))
    >>> relevance = regard.explain.GenericRelevance().explain(model, inputs, metric)
    >>> chance = torch.rand(relevance.shape, generator=torch.Generator().manual_seed(0))
    >>> true, by_chance = (faithfulness(model, inputs, scores, metric, keep=[0, -1]) for scores in (relevance, chance))
    >>> bool(true.comprehensiveness > by_chance.comprehensiveness)
    True
    """
    free = _free(scores, keep, token_mask)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    order = scores.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    shares = torch.linspace(0, 1, steps + 1)
    deletion, insertion = [], []
    for share in shares.tolist():
        first = rank < (share * free.sum(1, keepdim=True)).round()
        deletion.append(_measured(model, inputs, metric, first & free))
        insertion.append(_measured(model, inputs, metric, ~first & free))
    return Faithfulness(shares, torch.stack(deletion), torch.stack(insertion))


def _free(scores: Tensor, keep: Where, token_mask: Tensor | None) -> Tensor:
    """(batch, tokens): those that may be hidden."""
    if scores.ndim != 2 or bool(scores.isnan().any()):
        what = "NaN" if scores.ndim == 2 else f"shape {tuple(scores.shape)}"
        raise ValueError(f"scores must be numbers (batch, tokens), got {what}")
    kept = resolve(keep, 0, scores.shape[1], batch=scores.shape[0], device=scores.device, what="keep")
    free = ~kept.expand(scores.shape)
    if token_mask is None:
        return free
    if token_mask.shape != scores.shape:
        raise ValueError(f"token_mask has shape {tuple(token_mask.shape)}, scores {tuple(scores.shape)}")
    return free & token_mask.bool().to(free.device)


def _measured(model: Module, inputs: Inputs, metric: Metric, hidden: Tensor) -> Tensor:
    """(batch,): the metric with these tokens hidden."""
    block: AbstractContextManager[Any] = steer(model, Block(keys=hidden)) if bool(hidden.any()) else nullcontext()
    with torch.no_grad(), block:
        found = metric(run(model, inputs))
    if not isinstance(found, Tensor) or found.shape != hidden.shape[:1]:
        seen = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"metric must return one number for each of the {len(hidden)} texts, got {seen}")
    return found.cpu()
