"""Layer-wise relevance by the rules that fit attention: one backward pass with its gradients changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from regard.explain._gradients import check_total
from regard.explain.explanation import Explanation, Inputs, run
from regard.runtime import AttentionCall, Entry, HiddenCall, Proceed
from regard.steer.metrics import Metric

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.ReLU6)

_GATED = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"))
"""Names of a gate's projection and of that which it multiplies."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AttnLRP(Explanation):
    """What each token's embedding has of the metric, conserved from layer to layer: embedding times a changed gradient.

    The rules, each a factor of a gradient, so that the model runs as it is, on fused attention:

    - ``P V`` and ``Q Kᵀ`` are products of two variables, each of which gets half: gradients of values are halved, those of
      queries and keys quartered. The softmax between has its own gradient, its Taylor expansion.
    - a norm is a multiplication by a constant, ``x ↦ (x − mean) · c``;
    - an activation ``f`` is a multiplication by ``f(x) / x``;
    - the two factors of a gated MLP get half each;
    - what is linear has its own gradient.

    It fails where the metric rests on biases, which take part of the relevance with them; of models whose activations are
    functions and no modules, which keep their own gradient. It says how much a token has of the metric, not what would be
    without it.

    Raises:
        ValueError: no metric; a model that does not tell its embeddings, whose gated MLPs have both factors in one projection
            or are gated by a function that is no module, or with a mixer without softmax.

    R. Achtibat et al. (2024), AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is 4", return_tensors="pt")
    >>> metric = regard.logit_difference(*tokenizer.convert_tokens_to_ids(["8", "7"]))
    >>> relevance = AttnLRP().explain(model, inputs, metric)
    >>> tokenizer.decode(inputs["input_ids"][0, relevance[0].argmax()])
    '8'
    """

    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """(batch, tokens): the part of the metric that each token's embedding has; they sum to about all of it."""
        if metric is None:
            raise ValueError("this explanation needs a metric, such as regard.logit_difference(answer, wrong)")
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            raise ValueError(f"{type(model).__name__} does not tell its embeddings by get_input_embeddings()")
        embedded: list[Tensor] = []

        def keep(module: Module, arguments: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        products = _Products()
        with ExitStack() as stack:
            stack.callback(embeddings.register_forward_hook(keep).remove)
            stack.enter_context(_rules(model))
            products.enter(model)
            stack.callback(products.leave)
            with torch.enable_grad():
                total = metric(run(model, inputs))
                check_total(total)
                total = total.sum()
        products.check()
        (gradient,) = torch.autograd.grad(total, embedded[:1])
        return (gradient * embedded[0]).sum(-1).detach()


class _Products(Entry):
    """Gives each factor of attention's two products its half."""

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        if isinstance(call, HiddenCall):
            raise ValueError(f"{call.place.path} is a mixer without softmax, for which AttnLRP has no rule")
        query, key = (_of_gradient(tensor, 0.25) for tensor in (call.query, call.key))
        return proceed(replace(call, query=query, key=key, value=_of_gradient(call.value, 0.5)))


@contextmanager
def _rules(model: Module) -> Iterator[None]:
    """Norms, activations and gates of the model with their rules, while the block is open."""
    rules = [rule for path, module in model.named_modules() for rule in _rules_of(path, module)]
    with ExitStack() as stack:
        for module, rule in sorted(rules, key=lambda one: one[1] is _half):  # what is halved has its own rule before
            stack.callback(module.register_forward_hook(rule).remove)
        yield


_Rule = Callable[[Module, tuple[Any, ...], Tensor], Tensor]


def _rules_of(path: str, module: Module) -> list[tuple[Module, _Rule]]:
    """The rules that a module brings: a norm is known by its name, for each model has its own class."""
    kind = type(module).__name__
    if _is_activation(module):
        return [(module, _activation)]
    if kind.endswith(("RMSNorm", "LayerNorm")):
        return [(module, _norm)]
    children = dict(module.named_children())
    if "gate_up_proj" in children:
        raise ValueError(f"{path} has both factors of its gate in one projection, for which AttnLRP has no rule")
    linear = next((children[other] for gate, other in _GATED if {gate, other} <= children.keys()), None)
    if linear is None:
        return []
    activation = next((child for child in children.values() if _is_activation(child)), None)
    if activation is None:
        raise ValueError(f"{path} is gated by a function that is no module, for which AttnLRP has no rule")
    return [(linear, _half), (activation, _half)]


def _is_activation(module: Module) -> bool:
    return isinstance(module, _ACTIVATIONS) or type(module).__name__.endswith(("Activation", "GELU", "SiLU"))


def _half(module: Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return _of_gradient(output, 0.5)


def _activation(module: Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    x: Tensor = arguments[0]
    return x * _ratio(output, x)


def _norm(module: Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """A norm with its scale held constant."""
    x: Tensor = arguments[0]
    bias: Tensor | None = getattr(module, "bias", None)
    if not type(module).__name__.endswith("RMSNorm"):
        x = x - x.mean(dim=-1, keepdim=True)
    if bias is None:
        return x * _ratio(output, x)
    return x * _ratio(output - bias, x) + bias.detach()


def _ratio(output: Tensor, x: Tensor) -> Tensor:
    """The constant that takes x to the output; where x is 0, nothing flows."""
    x, output = x.detach(), output.detach()
    return torch.where(x == 0, 0.0, output / x.where(x != 0, 1.0))


class _OfGradient(torch.autograd.Function):
    """A tensor as it is, of whose gradient a share goes on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: float) -> Tensor:
        ctx.share = share
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.share, None


def _of_gradient(tensor: Tensor, share: float) -> Tensor:
    scaled: Tensor = _OfGradient.apply(tensor, share)  # type: ignore[no-untyped-call]
    return scaled
