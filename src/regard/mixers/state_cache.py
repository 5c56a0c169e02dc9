"""A mixer's state in the place of a layer's keys and values: what a model of transformers hands on from step to step."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from regard.mixers.mixer import Mixer
from regard.mixers.state import State


class StateLayer(CacheLayerMixin):
    """One layer of a cache that holds the state of a mixer; its size does not grow with the text.

    ``generate`` reorders it for beams, repeats and selects texts. What a state has taken in cannot be taken back, so
    `crop`, as assisted generation needs it, is refused.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: State | None = None

    def mix(self, mixer: Mixer, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mixer's output (batch, tokens, dim), from the state that is held to the one that is held from then on."""
        mixed: tuple[Tensor, State] = mixer(x, self.state, mask)
        y, self.state = mixed
        self.is_initialized = True
        return y

    def get_seq_length(self, *_: Any) -> int:
        """How many tokens it has seen."""
        return 0 if self.state is None else self.state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask for so many more tokens would tell of, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """−1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """−1: there is no limit; by the method's former name."""
        return -1

    def reset(self) -> None:
        """Forget the text."""
        self.state, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have row i be that of text ``beam_idx[i]``."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts alone."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every text so many times, side by side."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.state.texts).repeat_interleave(repeats))

    def crop(self, *_: Any) -> NoReturn:
        """Refuse to take tokens back."""
        raise ValueError(
            "the state of a mixer cannot be cropped: it has taken the tokens in. Assisted and prompt-lookup generation, "
            "which take tokens back, do not go with mixers"
        )

    def offload(self) -> None:
        """Leave the state where it is, for it is small."""

    def prefetch(self) -> None:
        """Do nothing, for it was not moved."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first call of `mix` makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Refuse keys and values, of which it holds none."""
        raise TypeError("this layer of the cache holds the state of a mixer, and takes no keys and values")


def layer_of(cache: Cache, number: int) -> StateLayer:
    """The layer of this number of a cache, made one that holds a state where it is still empty.

    Raises:
        ValueError: a layer that holds keys and values of a text, or what a linear layer kept of it.
    """
    while len(cache.layers) <= number:
        cache.layers.append(
            StateLayer() if cache.layer_class_to_replicate is None else cache.layer_class_to_replicate()
        )
    held: Any = cache.layers[number]
    if isinstance(held, StateLayer):
        return held
    if not _is_empty(held):
        raise ValueError(
            f"layer {number} of the cache holds what another layer kept of a text, no state of a mixer; begin with a new one"
        )
    made = cache.layers[number] = StateLayer()
    return made


def _is_empty(held: Any) -> bool:
    """Whether a layer of a cache holds nothing of a text yet, keys and values or the state of a linear layer."""
    if isinstance(held, CacheLayerMixin):
        return not held.get_seq_length()
    parts = [part.values() if isinstance(part, dict) else (part,) for part in vars(held).values()]
    return not any(isinstance(tensor, Tensor) for part in parts for tensor in part)
