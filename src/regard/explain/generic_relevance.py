"""Relevance through the layers of any transformer: attention where its gradient says that it helped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain._chain import check_chain
from regard.explain._gradient_map import GradientMap
from regard.explain._gradients import gradients_of
from regard.explain.explanation import Explanation, Inputs
from regard.steer.metrics import Metric
from regard.tokens import Layers


@dataclass(frozen=True, kw_only=True, repr=False)
class GenericRelevance(Explanation):
    """One row of ``R_L``, with ``R_0 = I`` and ``R_l = R_{l−1} + Ā_l R_{l−1}``, ``Ā = mean_h max(∇P_h ∘ P_h, 0)``.

    ``∇P`` is the gradient of the metric with respect to the attention matrix: ``∇P_ij = g_i · v_j`` from the gradient ``g``
    at the output of a head, so that one backward pass gives all of them and no matrix is stored. The row is followed from
    the last layer to the first, one walk over each layer's matrix in strips.

    It fails where heads work against the metric, whose part is cut off; and where what values hold was moved by MLPs.

    Args:
        query: the position whose row is asked for, from the end if negative: the last one of a language model, the first of a
            classifier that reads a class token.
        layers: those that are followed, as for `regard.watch`; all by default. Each needs as many queries as keys.

    Raises:
        ValueError: no metric; a layer with other numbers of queries than of keys, or that is a mixer without
            softmax.
        IndexError: a query that is not there.

    H. Chefer, S. Gur, L. Wolf (2021), Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers: its rule for self-attention.

    >>> import torch, regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is 4", return_tensors="pt")
    >>> right, wrong = tokenizer.convert_tokens_to_ids(["8", "7"])
    >>> relevance = GenericRelevance().explain(model, inputs, regard.logit_difference(right, wrong))
    >>> tokenizer.decode(inputs["input_ids"][0, relevance[0, :-1].argmax()])
    '8'
    """

    query: int = -1
    layers: Layers | None = None

    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """(batch, tokens): the relevance of each token for the metric at the query, its own of 1 included."""
        maps = {path: GradientMap(of) for path, of in gradients_of(model, inputs, metric, self.layers).items()}
        check_chain(maps)
        first = next(iter(maps.values()))
        batch, _, tokens, _ = first.shape
        if not -tokens <= self.query < tokens:
            raise IndexError(f"query {self.query} was asked for, but there are {tokens} tokens")
        with torch.no_grad():
            row = torch.zeros(batch, 1, tokens, 1, dtype=first.dtype, device=first.device)
            row[:, :, self.query] = 1.0
            for attention in reversed(maps.values()):
                row = row + attention.T @ row
        return row[:, 0, :, 0]
