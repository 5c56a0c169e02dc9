"""The image tokens that the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache._images import _ImagePolicy, at_entries, best
from regard.cache.policy import Entries, Reads


@dataclass(frozen=True, kw_only=True)
class ImageRank(_ImagePolicy):
    """Keep the image tokens that the last token attends to most, in the caches of the layers from ``layer`` on:

    ``φ_j = mean_h P^h_last,j`` for j in the image, P being the attention of the layer before. One ranking serves all later
    layers and heads. Earlier layers, and text, keep everything.

    Args:
        budget: image tokens of each text: a number of them, or a share; the paper takes 0.5.
        layer: K, the first layer that drops, from 1; the paper takes 2.
        rest: what becomes of the others, as for every `BudgetPolicy`.
        image: positions, a boolean mask, or a function of token ids; by default the tokens that the model's config names.

    Left out: the paper drops hidden states, so that the prompt itself is read faster, without them. Here the prompt is read
    as ever, and what is generated sees what is left. The image tokens of a further turn are ranked among themselves. K
    counts layers whose cache grows; those with a sliding window are left alone.

    L. Chen et al. (2024), An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models (FastV).

    Raises:
        ValueError: a model whose config names no image token; a text without any; a model of too few layers.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, image_token_id=59)).eval()
    >>> with torch.no_grad(), regard.compress(model, regard.cache.ImageRank(budget=0.25)) as cache:
    ...     _ = model(torch.tensor([[1, 59, 59, 59, 59, 7, 8]]))
    >>> [layer.kept[0] for layer in cache.report().layers]
    [7, 7, 4]
    """

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"ImageRank: layer is the first that drops, ranked by the one before: at least 1, got {self.layer!r}"
            )

    @property
    def reads(self) -> Reads:
        """The attention of the last query."""
        return Reads(1)

    def score(self, entries: Entries) -> Tensor:
        """1 for text and the best of the image, 0 for the rest of it."""
        if entries.layers <= self.layer:
            raise ValueError(
                f"ImageRank drops in the layers from {self.layer} on, but the model has {entries.layers}, 0 to "
                f"{entries.layers - 1}: choose an earlier layer="
            )
        if entries.layer == self.layer - 1:
            entries.memory[ImageRank] = self._stay(entries)
        if entries.layer < self.layer:
            return torch.ones_like(entries.received)
        return at_entries(entries.memory[ImageRank], entries)

    def _stay(self, entries: Entries) -> Tensor:
        """(batch, seen) boolean: the tokens that stay."""
        image = self.new_image(entries, entries.beside)
        place = torch.where(entries.real, entries.positions, entries.seen)  # what is no entry goes to the end, cut off
        attention = entries.received.new_zeros(*entries.received.shape[:2], entries.seen + 1)
        attention = attention.scatter(2, place, entries.received)[..., :-1].mean(dim=1)
        return ~image | best(attention, image, self.targets(image.sum(dim=1)))
