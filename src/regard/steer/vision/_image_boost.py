"""More attention to the image in the higher layers."""

from __future__ import annotations

from torch.nn import Module

from regard.steer.vision.emphasize import Emphasize
from regard.tokens import Layers, decoder_layers, image_tokens


def image_boost(model: Module, by: float = 0.5, layers: Layers | None = None) -> Emphasize:
    """Amplify the logits of the image: ``s'_ij = s_ij + λ |s_ij|`` for its tokens j, i the last query, in the higher layers.

    Against sycophancy: a model that agrees with its user whatever the image shows gives the image little attention in its
    higher layers, and does better with more, while more in the lower half ruins its answers. S. Li et al. (2025), Have the
    VLMs Lost Confidence? A Study of Sycophancy in VLMs.

    Left out: the paper's remedies by prompt and by training. What is known here of its rule is that a factor λ amplifies the
    logits of vision tokens in layers 16 to 32 of 32; the form is that of `Emphasize`, and λ is to be tried.

    Args:
        model: a transformers vision–language model.
        by: λ, at least 0.
        layers: the upper half by default.

    Raises:
        ValueError: a model without image tokens; ``by`` negative, infinite or NaN.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, image_token_id=59))
    >>> print(image_boost(model, by=0.5))
    Emphasize(keys=ImageTokens(ids=(59,)), by=0.5, layers=['model.layers.2.*', 'model.layers.3.*'])
    """
    every = decoder_layers(model)
    chosen = every[len(every) // 2 :] if layers is None else layers
    return Emphasize(image_tokens(model), by, layers=chosen)
