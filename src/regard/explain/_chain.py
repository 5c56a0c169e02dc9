"""The attention maps of one run, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Module

from regard.explain.explanation import Inputs, run
from regard.maps import TokenMap
from regard.tokens import Layers
from regard.watch import watch


def maps_of(model: Module, inputs: Inputs, layers: Layers | None) -> dict[str, TokenMap]:
    """The map of each layer of one run, by its path, in order."""
    with torch.no_grad(), watch(model, keep_maps=True, layers=layers) as seen:
        run(model, inputs)
    return {path: maps[0] for path, maps in seen.maps.items()}


def check_chain(maps: Mapping[str, TokenMap]) -> None:
    """Refuse layers that cannot follow one another.

    Raises:
        ValueError: other numbers of queries than of keys, or of tokens than the layer before.
    """
    tokens = next(iter(maps.values())).shape[2]
    for path, attention in maps.items():
        queries, keys = attention.shape[2:]
        if not queries == keys == tokens:
            raise ValueError(
                f"{path} has {queries} queries and {keys} keys, the first layer {tokens} tokens: a chain needs the same "
                "ones in all layers; choose those of one stack by layers=, such as 'decoder.*.self_attn'"
            )
