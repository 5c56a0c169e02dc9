"""Attention rollout: where the content of a token comes from, if attention and residual stream carried all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain._chain import check_chain, maps_of
from regard.explain.explanation import Explanation, Inputs
from regard.maps import TokenMap
from regard.steer.metrics import Metric
from regard.tokens import Layers


@dataclass(frozen=True, kw_only=True, repr=False)
class Rollout(Explanation):
    """One row of the product of all layers, ``e_qᵀ Ã_L ⋯ Ã_1`` with ``Ã_l = ρ I + (1 − ρ) · mean_h P_lh``.

    Each layer is one product of its transposed map with a vector, from the last layer to the first: nothing of size N×N is
    made, and a text of any length takes the memory of its queries and keys. A row of probabilities stays one, so that what
    tokens have sums to 1.

    It fails where most attention goes to a sink, which it takes for content; where values are what matters, such as a token
    that is looked at and ignored; and of deep models, whose rows all become alike.

    Args:
        residual: ρ, from 0 to 1, what the residual stream carries past each layer; one half in the paper.
        query: the position whose row is asked for, from the end if negative; None for the mean of all rows.
        layers: those whose attention is followed, as for `regard.watch`; all by default. Each needs as many queries as keys.

    Raises:
        ValueError: a residual outside 0 to 1; a layer with other numbers of queries than of keys.
        IndexError: a query that is not there.

    S. Abnar and W. Zuidema (2020), Quantifying Attention Flow in Transformers.

    >>> import torch
    >>> encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    >>> shares = Rollout(query=0).explain(encoder, torch.randn(2, 9, 16))
    >>> shares.shape, bool(torch.allclose(shares.sum(-1), torch.ones(2)))
    (torch.Size([2, 9]), True)
    """

    residual: float = 0.5
    query: int | None = -1
    layers: Layers | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.residual <= 1:
            raise ValueError(f"residual must be from 0 to 1, got {self.residual}")

    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """(batch, tokens): the share of each token in the query's content; whatever the ``metric``."""
        maps = maps_of(model, inputs, self.layers)
        check_chain(maps)
        return self.through(list(maps.values()))

    @torch.no_grad()
    def through(self, maps: Sequence[TokenMap]) -> Tensor:
        """(batch, tokens): the row through these maps, the first layer's first; hidden maps of mixers are maps too."""
        first = maps[0]
        batch, _, tokens, _ = first.shape
        row = torch.zeros(batch, 1, tokens, 1, dtype=first.dtype, device=first.device)
        if self.query is None:
            row += 1 / tokens
        elif -tokens <= self.query < tokens:
            row[:, :, self.query] = 1.0
        else:
            raise IndexError(f"query {self.query} was asked for, but there are {tokens} tokens")
        for attention in reversed(maps):
            row = attention.mean_heads().residual(1 - self.residual).T @ row.to(attention.device, attention.dtype)
        return row[:, 0, :, 0]
