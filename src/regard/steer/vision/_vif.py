"""Reallocation between image and instruction: to the image in middle layers, back to the instruction in deep ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from regard.steer.edit import Edit
from regard.steer.redistribute import Redistribute
from regard.steer.temperature import Temperature
from regard.steer.vision._prompt import Inputs, read_prompt
from regard.tokens import Layers, decoder_layers
from regard.watch import Received, watch


def vif(
    model: Module,
    inputs: Inputs,
    temperature: float = 0.8,
    middle_share: float = 0.1,
    deep_share: float = 0.3,
    middle: Layers | None = None,
    deep: Layers | None = None,
) -> list[Edit]:
    """Edits that hold a prompt's attention to the image where the layers read it, and to the instruction where they answer.

    In the middle layers ``P = softmax(s / τ)``, and the share α₁ of what a query gives to the instruction and to the image's
    inactive tokens goes to its active ones; in the deep layers the share α₂ of what it gives to the image goes to the
    instruction. What is given is shared out in proportion to what each key has, and rows keep their sums. X. Yu et al.
    (2025), Visual Multi-Agent System: Mitigating Hallucination Snowballing via Visual Flow.

    The edits belong to this prompt. Left out: the visual flow itself, relay tokens that one agent hands to the next through
    a block that has to be trained. The authors' code gives equal parts to all keys, which the text does not; where its middle
    and deep layers begin, the text does not say: here each is a third of the depth.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        temperature: τ.
        middle_share: α₁, from 0 to 1.
        deep_share: α₂, from 0 to 1.
        middle: the middle layers; the second third by default.
        deep: the deep layers; the last third by default.

    Raises:
        ValueError: no image token; no text after the image; a number out of range.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}
    >>> edits = vif(model, inputs)
    >>> [type(edit).__name__ for edit in edits]
    ['Temperature', 'Redistribute', 'Redistribute']
    >>> with torch.no_grad(), regard.steer(model, *edits):
    ...     _ = model(**inputs)
    """
    prompt = read_prompt(model, inputs)
    if not bool(prompt.question.any(dim=1).all()):
        raise ValueError("a text has no instruction: no text comes after its image")
    every = decoder_layers(model)
    third, two_thirds = round(len(every) / 3), round(2 * len(every) / 3)
    middle = every[third:two_thirds] if middle is None else middle
    deep = every[two_thirds:] if deep is None else deep
    with torch.no_grad(), watch(model, Received(), layers=every, token_mask=prompt.real) as seen:
        model(**inputs)
    by_head = torch.from_numpy(seen.dataset().received.values).to(prompt.image.device)
    received = by_head.mean(dim=2)  # (layer, batch, key)
    inactive = torch.stack([inactive_tokens(received[:, row], image) for row, image in enumerate(prompt.image)])
    return [
        Temperature(temperature, layers=middle),
        Redistribute(prompt.question | inactive, prompt.image & ~inactive, middle_share, layers=middle),
        Redistribute(prompt.image, prompt.question, deep_share, layers=deep),
    ]


def inactive_tokens(received: Tensor, image: Tensor, fluctuation: float = 0.2) -> Tensor:
    """Which image tokens no layer looks at: (tokens,) boolean, from what each receives in each layer (layers, tokens).

    Inactive is a token whose attention is below the lower quartile of the image's in the mean over layers, and departs from
    its own mean by no more than a fifth in any layer: the paper's two thresholds, for curves over layers.

    >>> import torch
    >>> received = torch.tensor([[0.10, 0.1, 0.5, 0.9, 0.8], [0.11, 0.3, 0.6, 0.9, 0.8]])
    >>> inactive_tokens(received, torch.tensor([True, True, True, True, True]))
    tensor([ True, False, False, False, False])
    """
    mean = received.mean(dim=0)
    steady = ((received - mean).abs() <= fluctuation * mean).all(dim=0)
    return image & steady & (mean < mean[image].quantile(0.25))
