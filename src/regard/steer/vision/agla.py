"""Assembly of global and local attention: the next token, with what the model says of the image's relevant part alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module, functional

from regard.steer.vision._branch import Branch, check_beta, plausible
from regard.steer.vision._prompt import Inputs


class AGLA:
    """A logits processor for ``generate``: ``ℓ' = ℓ + α ℓ_local``, ℓ_local from an image of which the rest is masked.

    Tokens whose probability is below β of the likeliest one's, by ℓ, are ruled out. W. An et al. (2024), AGLA: Mitigating
    Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention.

    Left out: the model that matches image and prompt, BLIP's, and the gradients of its match by which the paper tells what
    is relevant. Bring a relevance map of any origin, and mask the image by `keep_relevant`. Made for one prompt or batch of
    prompts, without beam search; it may be used again for the same.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns, and ``generate`` is given.
        local: the same with pixels of which only the relevant part is kept.
        alpha: of the local scores.
        beta: greater than 0, at most 1.

    Raises:
        ValueError: β out of range; no image token; inputs of different texts; when called, a text that does not go on with
            the prompt.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}  # a real model's have pixels, too
    >>> assembled = AGLA(model, inputs, local=inputs)
    >>> model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, logits_processor=[assembled]).shape
    torch.Size([1, 8])
    """

    def __init__(self, model: Module, inputs: Inputs, local: Inputs, alpha: float = 2.0, beta: float = 0.5) -> None:
        check_beta("AGLA", beta)
        if not torch.equal(torch.as_tensor(inputs["input_ids"]), torch.as_tensor(local["input_ids"])):
            raise ValueError("AGLA needs inputs and local to hold the same input_ids, and pixels that differ")
        self.alpha, self.beta = alpha, beta
        self._branch = Branch(model, local)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The assembled scores (batch, vocabulary)."""
        return plausible(scores + self.alpha * self._branch(input_ids).to(scores), scores, self.beta)


def keep_relevant(pixels: Tensor, relevance: Tensor, similarity: float) -> Tensor:
    """Zero all but the most relevant part ``1 − similarity / 2`` of an image: the better the prompt fits, the less is kept.

    A zero is what the pixels mean by it. The authors mask the raw image, whose zeros are black: to have that, mask it before
    the processor. In pixels that a processor has normalised a zero is the mean colour, grey.

    Args:
        pixels: (batch, channels, height, width), or (patches, values) as Qwen2-VL's processor returns them.
        relevance: (batch, rows, columns), brought to the image's size, or (patches,).
        similarity: of image and prompt, from −1 to 1; at least one pixel or patch is kept.

    Raises:
        ValueError: shapes that do not fit, a similarity out of range.

    >>> import torch
    >>> keep_relevant(torch.ones(4, 2), torch.tensor([0.1, 0.4, 0.3, 0.2]), similarity=1.0)[:, 0]
    tensor([0., 1., 1., 0.])
    """
    if not -1 <= similarity <= 1:
        raise ValueError(f"keep_relevant needs a similarity from -1 to 1, got {similarity}")
    kept = min(1 - similarity / 2, 1.0)
    if pixels.ndim == 2 and relevance.shape == pixels.shape[:1]:
        return pixels * _most(relevance[None], kept)[0, :, None]
    if pixels.ndim == 4 and relevance.ndim == 3 and len(relevance) == len(pixels):
        size = (pixels.shape[2], pixels.shape[3])
        full = functional.interpolate(relevance[:, None].float(), size, mode="bilinear", align_corners=False)
        return pixels * _most(full.flatten(1), kept).reshape(len(full), 1, *size)
    raise ValueError(
        f"keep_relevant needs pixels (batch, channels, height, width) with relevance (batch, rows, columns), or (patches, "
        f"values) with (patches,); got {tuple(pixels.shape)} with {tuple(relevance.shape)}"
    )


def _most(values: Tensor, part: float) -> Tensor:
    number = max(math.ceil(values.shape[1] * part), 1)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter(1, values.topk(number, dim=1).indices, True)
