"""The calls of one run, with the gradient of a metric at what their heads put out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain.explanation import Inputs, run
from regard.runtime import AttentionCall, Entry, HiddenCall, Proceed, Site
from regard.steer.metrics import Metric
from regard.tokens import Layers, Selection


class Differentiated(NamedTuple):
    """A ``call`` apart from the graph, and the metric's ``gradient`` (batch, heads, queries, width) at its output."""

    call: AttentionCall
    gradient: Tensor


def gradients_of(
    model: Module, inputs: Inputs, metric: Metric | None, layers: Layers | None
) -> dict[str, Differentiated]:
    """One forward and one backward pass: each layer's call and gradient, by its path, in order.

    Raises:
        ValueError: no metric; one that is no number of a text; a mixer without softmax.
    """
    if metric is None:
        raise ValueError("this explanation needs a metric, such as regard.logit_difference(answer, wrong)")
    keeper = _Keeper(Selection(layers))
    keeper.enter(model)
    try:
        with torch.enable_grad():
            total = metric(run(model, inputs))
            check_total(total)
            total = total.sum()
    finally:
        keeper.leave()
    keeper.check()
    gradients = torch.autograd.grad(total, list(keeper.outputs.values()), allow_unused=True, materialize_grads=True)
    return {
        path: Differentiated(keeper.calls[path], gradient)
        for path, gradient in zip(keeper.outputs, gradients, strict=True)
    }


def check_total(total: object) -> None:
    """Refuse what is no number of a text.

    Raises:
        ValueError: another shape than (batch,) or ().
    """
    if not isinstance(total, Tensor) or total.ndim > 1:
        seen = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise ValueError(f"metric must return a tensor with one number for each text, or one for all, got {seen}")


class _Keeper(Entry):
    """Keeps calls and their outputs, which a gradient goes through even where no parameter wants one."""

    def __init__(self, selection: Selection) -> None:
        self.calls: dict[str, AttentionCall] = {}
        self.outputs: dict[str, Tensor] = {}
        self._selection = selection

    def check(self) -> None:
        super().check()
        self._selection.check(self.block.seen)

    def wants(self, site: Site) -> bool:
        return self.block.chooses(self._selection, site)

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        path = call.place.path
        if isinstance(call, HiddenCall):
            raise ValueError(
                f"{path} is a mixer without softmax, of whose map no gradient is taken; leave it out by layers="
            )
        output = proceed(call)
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.calls[path], self.outputs[path] = call.detached(), output
        return output
