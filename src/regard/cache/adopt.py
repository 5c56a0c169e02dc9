"""Making a cache of transformers one that can drop entries."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from regard.cache.layer import KeptLayer

if TYPE_CHECKING:
    from regard.cache.compress import compress


def adopt(cache: Any, keeper: compress) -> list[KeptLayer]:
    """Put layers that can drop entries in the place of a cache's growing layers, and return them.

    Sliding windows, and layers without keys, are left as they are.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"compress works on a decoder's DynamicCache, not on {type(cache).__name__}")
    if cache.offloading:
        raise ValueError("compress cannot drop entries of an offloaded cache; use a DynamicCache without offloading")
    for layer in cache.layers:
        _check(layer)
    growing = [place for place, layer in enumerate(cache.layers) if type(layer) in (DynamicLayer, KeptLayer)]
    for rank, place in enumerate(growing):
        cache.layers[place] = _kept(cache.layers[place], rank, len(growing), keeper)
    if cache.layer_class_to_replicate is DynamicLayer:
        config: Any = keeper.model.config
        layers = config.get_text_config(decoder=True).num_hidden_layers
        vars(cache)["layer_class_to_replicate"] = functools.partial(_next, cache, layers, keeper)  # called like a class
    return [layer for layer in cache.layers if isinstance(layer, KeptLayer)]


def _next(cache: Cache, layers: int, keeper: compress) -> KeptLayer:
    return KeptLayer(len(cache.layers), layers, keeper)


def _kept(layer: Any, rank: int, layers: int, keeper: compress) -> KeptLayer:
    if isinstance(layer, KeptLayer):
        layer.keeper = keeper
        return layer
    kept = KeptLayer(rank, layers, keeper)
    if layer.get_seq_length():
        kept.fill(layer.keys, layer.values)
    return kept


def _check(layer: Any) -> None:
    """Refuse layers that hold keys in a way of their own."""
    known = (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer)
    if isinstance(layer, CacheLayerMixin) and type(layer) not in known:
        what = "quantised" if "Quantized" in type(layer).__name__ else type(layer).__name__
        raise ValueError(
            f"compress cannot drop entries of a cache whose layers are {what}; use a DynamicCache, "
            "generate's default, instead"
        )
