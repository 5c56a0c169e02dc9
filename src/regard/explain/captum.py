"""Attributions of captum, as baselines: integrated gradients, gradient times input, DeepLIFT and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain.explanation import Explanation, Inputs
from regard.steer.metrics import Metric


@dataclass(frozen=True, kw_only=True, repr=False)
class Captum(Explanation):
    """What one of captum's layer attributions gives to the embedding of each token, summed over its width.

    Args:
        method: the name of a class of ``captum.attr``, such as "LayerIntegratedGradients" or "LayerGradientXActivation".
        arguments: of its ``attribute``, such as ``{"n_steps": 50, "baselines": pad_token_id}``.

    Raises:
        ImportError: captum is not installed.
        ValueError: no such class; no metric; inputs without ``input_ids``; a model that does not tell its embeddings.

    M. Sundararajan, A. Taly, Q. Yan (2017), Axiomatic Attribution for Deep Networks, for integrated gradients.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is 4", return_tensors="pt")
    >>> metric = regard.logit_difference(*tokenizer.convert_tokens_to_ids(["8", "7"]))
    >>> Captum(arguments={"n_steps": 8}).explain(model, inputs, metric).shape
    torch.Size([1, 30])
    """

    method: str = "LayerIntegratedGradients"
    arguments: Mapping[str, Any] | None = None

    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """(batch, tokens): the part of each token in the metric; of integrated gradients, in its change from the baseline."""
        made = self._made()
        if metric is None:
            raise ValueError("this explanation needs a metric, such as regard.logit_difference(answer, wrong)")
        if isinstance(inputs, Tensor) or "input_ids" not in inputs:
            raise ValueError("captum's layer attributions need inputs by name, with input_ids")
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            raise ValueError(f"{type(model).__name__} does not tell its embeddings by get_input_embeddings()")
        others = {name: value for name, value in inputs.items() if name != "input_ids"}

        def forward(ids: Tensor, *tensors: Tensor) -> Tensor:
            return metric(model(input_ids=ids, **dict(zip(others, tensors, strict=True))))

        with torch.enable_grad():
            attribution = made(forward, embeddings).attribute(
                inputs["input_ids"], additional_forward_args=tuple(others.values()), **(self.arguments or {})
            )
        found: Tensor = attribution.detach().sum(dim=-1)
        return found

    def _made(self) -> Any:
        try:
            import captum.attr
        except ImportError as error:
            raise ImportError('captum is not installed: pip install "regard[explain]"') from error
        made = getattr(captum.attr, self.method, None) if self.method.startswith("Layer") else None
        if made is None:
            known = [name for name in captum.attr.__all__ if name.startswith("Layer") and name != "LayerAttribution"]
            raise ValueError(
                f"captum.attr has no layer attribution {self.method!r}; there are {', '.join(sorted(known))}"
            )
        return made
