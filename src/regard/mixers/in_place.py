"""A mixer in the place of chosen layers of a pretrained model: a fresh one for its attention, the same for a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from regard.mixers.checkpoints import linear_layers, load_layer
from regard.mixers.mixer import Mixer
from regard.mixers.state_cache import StateLayer, layer_of
from regard.runtime import visible
from regard.tokens import Layers, Selection


class _InPlace(Module):
    """A mixer where a layer of a model stood, whose state the model's cache keeps."""

    def __init__(self, mixer: Mixer, layer_idx: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx

    def mixed(self, hidden_states: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """The mixed tokens, (batch, tokens, dim)."""
        held = StateLayer() if cache is None else layer_of(cache, self.layer_idx)
        return held.mix(self.mixer, hidden_states, _real(mask, hidden_states))


_Put = TypeVar("_Put", bound=_InPlace)


class MixerAttention(_InPlace):
    """What stands where a layer's attention stood: it is called as that was, and has the model's cache keep the state."""

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """The mixed tokens, (batch, tokens, dim), and no weights."""
        return self.mixed(hidden_states, past_key_values, attention_mask), None


def replace_attention(
    model: Module, make: Callable[[int], Mixer], layers: Layers | None = None
) -> dict[str, MixerAttention]:
    """Put fresh mixers in the place of the attention of some layers of a decoder, to be trained.

    The model's cache keeps the states, so that ``generate`` goes on as before; layers that were not chosen attend as they
    did. The new weights take the dtype and the device of those that they replace.

    Args:
        model: a decoder of transformers whose layers have a ``self_attn`` with a ``layer_idx``, such as a Llama.
        make: the mixer for a model of this width.
        layers: as for `regard.watch`: numbers, a slice, a glob on the module's path; all by default.

    Returns:
        What was put in, by path.

    Raises:
        ValueError: no such layers; a mixer of another width.

    >>> import regard
    >>> from regard.mixers import GatedDeltaRule
    >>> from regard.mixers.in_place import replace_attention
    >>> model, tokenizer = regard.mini()
    >>> list(replace_attention(model, lambda dim: GatedDeltaRule(dim, heads=4), layers=[-1]))
    ['model.layers.3.self_attn']
    >>> model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[0]
    1
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if path.endswith("self_attn") and isinstance(getattr(module, "layer_idx", None), int)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers with a self_attn and its layer_idx, in whose place a mixer could stand"
        )
    selection = Selection(layers)
    put: dict[str, MixerAttention] = {}
    for number, (path, module) in enumerate(found):
        if not selection.wants(path, number, len(found)):
            continue
        weight = next(module.parameters())
        width = _width(module)
        mixer = make(width)
        if mixer.dim != width:
            raise ValueError(f"{path} is of width {width}, and the mixer made for it of width {mixer.dim}")
        put[path] = MixerAttention(mixer, module.layer_idx).to(weight.device, weight.dtype)
    selection.check(dict(enumerate(path for path, _ in found)))
    return _put(model, put)


class MixerLayer(_InPlace):
    """What stands where a model's own linear layer stood: called as that was, and the model's cache keeps its state."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The mixed tokens, (batch, tokens, dim)."""
        if others.get("cu_seq_lens_q") is not None:
            raise ValueError("a mixer in the place of a linear layer takes padded texts, and was given packed ones")
        return self.mixed(hidden_states, cache_params, attention_mask)


def replace_linear_layers(model: PreTrainedModel, layers: Layers | None = None) -> dict[str, MixerLayer]:
    """Put mixers of the same weights in the place of a model's own linear layers: Mamba's, Qwen3-Next's and Qwen3.5's.

    The model computes what it did. What is gained is what mixers are: `regard.watch` sees the matrix that each hides, padding
    is nothing on either side, and states are values. The mixers take the dtype and the device of the layers.

    Args:
        model: of transformers.
        layers: as for `regard.watch`, among the linear layers: numbers, a slice, a glob on the module's path; all by default.

    Returns:
        What was put in, by path.

    Raises:
        ValueError: a model without linear layers that `load_layer` knows; options that mixers do not have.

    >>> import torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> from regard.mixers.in_place import replace_linear_layers
    >>> model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)).eval()
    >>> ids = torch.tensor([[3, 1, 4]])
    >>> expected = model(ids).logits
    >>> list(replace_linear_layers(model))
    ['backbone.layers.0.mixer', 'backbone.layers.1.mixer']
    >>> bool(torch.allclose(model(ids).logits, expected, atol=1e-4))
    True
    """
    found = linear_layers(model)
    selection = Selection(layers)
    put: dict[str, MixerLayer] = {}
    for number, (path, module) in enumerate(found.items()):
        if selection.wants(path, number, len(found)):
            mixer = load_layer(module, model.config.get_text_config(), next(module.parameters()).dtype)
            put[path] = MixerLayer(mixer, vars(module)["layer_idx"])
    selection.check(dict(enumerate(found)))
    return _put(model, put)


def _put(model: Module, put: dict[str, _Put]) -> dict[str, _Put]:
    """Set what is to stand at these paths, all of it once nothing can fail any more."""
    for path, new in put.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.train(model.training))
    return put


def _width(module: Module) -> int:
    config = getattr(module, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(module).__name__} does not say its width: its config has no hidden_size")
    return width


def _real(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """(batch, tokens), boolean: which of the new tokens are real, by the mask that attention was given; None if all are."""
    if mask is None:
        return None
    tokens = hidden.shape[1]
    if mask.ndim == 4:  # what the last query sees
        mask = visible(mask[:, 0, -1])
    real = mask[:, -tokens:].bool().expand(len(hidden), tokens)
    return None if bool(real.all()) else real
