"""Making a layer of a transformers' cache one that can drop entries."""

from __future__ import annotations

import sys
import warnings
from typing import Any
from weakref import ref

from torch.nn import Module
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from regard.cache.layer import KeptLayer
from regard.cache.open_block import OpenBlock
from regard.runtime import AttentionCall


def adopt(cache: Any, number: int, model: Module, block: OpenBlock, call: AttentionCall) -> KeptLayer | None:
    """The layer of this number, which has just taken a call's keys, as one that can drop entries, put into its place.

    None for layers that are left as they are: sliding windows, which hold no more than the window, and cross-attention, which
    holds an image's states (Mllama). A model of sliding windows alone is warned of.

    Raises:
        ValueError: a cache, or a layer, that holds keys in a way of its own.
        RuntimeError: a layer that another block compresses.
    """
    _check(cache, model)
    layer = cache.layers[number]
    if isinstance(layer, KeptLayer):
        if layer.block is not block and layer.block.is_open:
            raise RuntimeError(f"a cache of {type(model).__name__} is being compressed already; leave that block first")
        if layer.block is not block:
            layer.block, layer.state = block, {}  # what another policy remembers is nothing to this one
        return layer
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    crossing = set(getattr(config, "cross_attention_layers", None) or ())
    growing = [
        place
        for place, other in enumerate(cache.layers)
        if type(other) in (DynamicLayer, KeptLayer) and place not in crossing
    ]
    if not growing and number == 0 and call.query.shape[2] > 1:
        warnings.warn(
            f"compress leaves {type(model).__name__} alone: every layer keeps a sliding window, and no more than it",
            UserWarning,
            stacklevel=2,
        )
    if number not in growing:
        return None
    layers = len(growing)
    if cache.layer_class_to_replicate is DynamicLayer:  # it makes its layers as they come
        layers = config.num_hidden_layers - len(crossing)
    kept = KeptLayer(growing.index(number), layers, block)
    kept.fill(layer.keys, layer.values)
    kept.handed = ref(layer.keys)
    kept.is_latent = _is_latent(kept, call)
    kept.recording = _is_assisted()
    cache.layers[number] = kept
    return kept


def has_own_keys(cache: Any, number: int) -> bool:
    """Whether the layer of this number holds keys; else it attends to those of another."""
    layers = getattr(cache, "layers", None)
    return layers is None or (number < len(layers) and isinstance(layers[number], CacheLayerMixin))


def lender(cache: Any, call: AttentionCall) -> KeptLayer | None:
    """The layer to whose entries a call of a layer without keys of its own attends, if they can be dropped."""
    layers = [layer for layer in cache.layers if isinstance(layer, KeptLayer)]
    found = next((layer for layer in layers if layer.made(call.key)), None)
    if found is not None:
        found.is_shared = True
    return found


def _is_latent(layer: KeptLayer, call: AttentionCall) -> bool:
    """Whether the model makes a call's keys and values of what its cache holds, instead of attending to that.

    Raises:
        ValueError: so it does, from several heads, of which it may mix what stands at different places.
    """
    if layer.made(call.key):
        return False
    if layer.groups[0].keys.shape[1] == 1:
        return True
    raise ValueError(
        f"compress cannot drop entries of {call.place.path}, which changes the keys that its cache returns before it attends "
        "to them"
    )


def _is_assisted() -> bool:
    """Whether ``generate`` has an assistant: of layers made before, it would have asked them to record."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name != "_assisted_decoding":
        frame = frame.f_back
    return frame.f_back is not None


def _check(cache: Any, model: Module) -> None:
    """Refuse caches and layers that hold keys in a way of their own."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"compress works on a decoder's DynamicCache, not on {type(cache).__name__}")
    if cache.offloading:
        raise ValueError(
            "compress cannot drop entries of an offloaded cache; use a DynamicCache without offloading, which holds less "
            "once it is compressed"
        )
    known = (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer)
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and type(layer) not in known:
            quantised = any("Quantized" in kind.__name__ for kind in type(layer).__mro__)
            what = type(layer).__name__
            if quantised:
                raise ValueError(
                    "compress cannot drop entries of a cache whose layers are quantised; use a DynamicCache, generate's "
                    "default, and a policy with rest=regard.cache.Quantise(bits=4)"
                )
            if "LinearAttention" in what:
                raise ValueError(
                    f"compress cannot drop entries of {type(model).__name__}, whose layers keep a recurrent state beside "
                    f"keys and values ({what}); it works on decoders that keep keys and values alone"
                )
            if "Indexed" in what:
                raise ValueError(
                    f"compress cannot drop entries of {type(model).__name__}, whose layers choose tokens by an index that "
                    f"they keep beside keys and values ({what})"
                )
            raise ValueError(
                f"compress cannot drop entries of a cache whose layers are {what}; use a DynamicCache, "
                "generate's default, instead"
            )
