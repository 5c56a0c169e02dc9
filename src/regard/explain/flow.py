"""Attention flow: how much of a token could reach another, if layers were pipes as wide as their attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from regard.explain._chain import check_chain, maps_of
from regard.explain.explanation import Explanation, Inputs
from regard.maps import TokenMap
from regard.steer.metrics import Metric
from regard.tokens import Layers

_UNIT = 2.0**-29
"""Capacities are whole numbers of this; what a node lets through is 1 and its rounding, within 31 bits."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Flow(Explanation):
    """The largest flow from each input token to a query of the last layer, through ``Ã_l = ρ I + (1 − ρ) · mean_h P_lh``.

    The graph has a node for each token after each layer, and an edge of capacity ``Ã_l[i, j]`` from token j before layer l to
    token i after it. Each token's flow is a problem of its own, so that they do not sum to 1. Capacities are rounded to
    2⁻²⁹.

    Longer texts than ``blocks`` are pooled: a node is a block of consecutive tokens, a capacity the mean over its queries of
    what they give to the other block's keys, and a block's flow is shared out equally among its tokens.

    It fails as rollout does, and takes minutes where layers and blocks are many.

    Args:
        residual: ρ, from 0 to 1; one half in the paper.
        query: the position of the token at the end, from the end if negative.
        layers: as for `Rollout`.
        blocks: the most nodes a layer may have.

    Raises:
        ImportError: scipy is not installed.
        ValueError: a residual outside 0 to 1, no blocks; a layer with other numbers of queries than of keys.
        IndexError: a query that is not there.

    S. Abnar and W. Zuidema (2020), Quantifying Attention Flow in Transformers.

    >>> import torch
    >>> encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    >>> flow = Flow(query=0).explain(encoder, torch.randn(1, 5, 16))
    >>> flow.shape, bool((flow <= 1.001).all())
    (torch.Size([1, 5]), True)
    """

    residual: float = 0.5
    query: int = -1
    layers: Layers | None = None
    blocks: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.residual <= 1:
            raise ValueError(f"residual must be from 0 to 1, got {self.residual}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")

    def explain(self, model: Module, inputs: Inputs, metric: Metric | None = None) -> Tensor:
        """(batch, tokens): the flow from each token to the query; whatever the ``metric``."""
        maps = maps_of(model, inputs, self.layers)
        check_chain(maps)
        return self.through(list(maps.values()))

    def through(self, maps: Sequence[TokenMap]) -> Tensor:
        """(batch, tokens): the flows through these maps, the first layer's first."""
        tokens = maps[0].shape[2]
        if not -tokens <= self.query < tokens:
            raise IndexError(f"query {self.query} was asked for, but there are {tokens} tokens")
        nodes = min(tokens, self.blocks)
        block = torch.arange(tokens) * nodes // tokens
        sizes = torch.bincount(block, minlength=nodes)
        with torch.no_grad():
            pooled = [attention.mean_heads().pool(nodes, nodes)[:, 0].cpu().double() for attention in maps]
        layers = [(1 - self.residual) * sums / sizes[:, None] + self.residual * torch.eye(nodes) for sums in pooled]
        end = int(block[self.query])
        flows = [_flows([layer[text].numpy() for layer in layers], end) for text in range(maps[0].shape[0])]
        return (torch.tensor(flows, dtype=maps[0].dtype)[:, block] / sizes[block]).to(maps[0].device)


def _flows(layers: list[numpy.ndarray], end: int) -> list[float]:
    """From each node before the first layer to one after the last."""
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError('flow needs scipy: pip install "regard[explain]"') from error
    nodes = len(layers[0])
    starts, ends, capacities = [], [], []
    for number, layer in enumerate(layers):
        query, key = numpy.nonzero(layer)
        starts.append(number * nodes + key)
        ends.append((number + 1) * nodes + query)
        capacities.append(numpy.rint(layer[query, key] / _UNIT))
    size = (len(layers) + 1) * nodes
    index = (numpy.concatenate(starts).astype(numpy.int32), numpy.concatenate(ends).astype(numpy.int32))
    graph = coo_array((numpy.concatenate(capacities).astype(numpy.int32), index), shape=(size, size)).tocsr()
    last = len(layers) * nodes + end
    return [_UNIT * maximum_flow(graph, start, last).flow_value for start in range(nodes)]
