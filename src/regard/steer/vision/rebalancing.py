"""Re-balancing contrastive decoding: away from what the text alone suggests, towards the image's significant tokens."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import Module

from regard.steer import steer
from regard.steer.block import Block
from regard.steer.vision._branch import Branch, check_beta, last_gaze, plausible
from regard.steer.vision._prompt import Inputs, read_prompt
from regard.tokens import decoder_layers

_STEPS = 1000


class Rebalancing:
    """A logits processor for ``generate``: ``ℓ' = ℓ + α (ℓ − ℓ_text) + γ (ℓ_visual − ℓ)``.

    The textual branch ℓ_text sees an image full of noise, so that it tells what the text suggests. The visual branch ℓ_visual
    sees, of the image, the significant tokens alone: those that the last token of the prompt attends to most. Tokens whose
    probability is below β of the likeliest one's, by ℓ, are ruled out. X. Liang et al. (2024), Mitigating Hallucination in
    Visual-Language Models via Re-Balancing Contrastive Decoding.

    The abstract names the branches and what each is for; the weights of the two terms are parameters here. The noise is that
    of visual contrastive decoding (`noised`). Made for one prompt or batch of prompts, without beam search; it may be used
    again for the same.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns, and ``generate`` is given.
        alpha: of the textual branch; 0 leaves it out.
        gamma: of the visual branch; 0 leaves it out.
        beta: greater than 0, at most 1.
        keep: the part of the image's tokens that are significant.
        noisy: inputs with a noisy image; `noised` makes them by default.

    Raises:
        ValueError: β or ``keep`` out of range; no image token; no pixels; when called, a text that does not go on with the
            prompt.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}  # a real model's have pixels, too
    >>> balanced = Rebalancing(model, inputs, noisy=inputs)
    >>> model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, logits_processor=[balanced]).shape
    torch.Size([1, 8])
    """

    def __init__(
        self,
        model: Module,
        inputs: Inputs,
        alpha: float = 1.0,
        gamma: float = 0.5,
        beta: float = 0.1,
        keep: float = 0.5,
        noisy: Inputs | None = None,
    ) -> None:
        check_beta("Rebalancing", beta)
        self.alpha, self.gamma, self.beta = alpha, gamma, beta
        self.significant = significant_tokens(model, inputs, keep)
        self._textual = Branch(model, noised(inputs) if noisy is None else noisy)
        others = read_prompt(model, inputs).image & ~self.significant
        unseen = [Block(others, layers=decoder_layers(model))] if bool(others.any()) else []
        self._visual = Branch(model, inputs, lambda: steer(model, *unseen)) if unseen else Branch(model, inputs)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The balanced scores (batch, vocabulary)."""
        balanced = scores
        if self.alpha:
            balanced = balanced + self.alpha * (scores - self._textual(input_ids).to(scores))
        if self.gamma:
            balanced = balanced + self.gamma * (self._visual(input_ids).to(scores) - scores)
        return plausible(balanced, scores, self.beta)


def significant_tokens(model: Module, inputs: Inputs, keep: float = 0.5) -> Tensor:
    """The part ``keep`` of an image's tokens that a prompt's last token attends to most, on the mean over layers and heads.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        keep: greater than 0, at most 1; at least one token is significant.

    Raises:
        ValueError: ``keep`` out of range; no image token.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> int(significant_tokens(model, {"input_ids": torch.tensor([[1, 59, 59, 59, 59, 7]])}).sum())
    2
    """
    if not 0 < keep <= 1:
        raise ValueError(f"significant_tokens needs keep to be greater than 0 and at most 1, got {keep}")
    image = read_prompt(model, inputs).image
    gaze = last_gaze(model, inputs).mean(dim=0)
    chosen = torch.zeros_like(image)
    for row, (values, of_image) in enumerate(zip(gaze, image, strict=True)):
        number = max(int(int(of_image.sum()) * keep), 1)
        chosen[row, values.masked_fill(~of_image, -1.0).topk(number).indices] = True
    return chosen


def noised(inputs: Inputs, step: int = 500, generator: Generator | None = None) -> dict[str, object]:
    """Inputs whose pixels are ``√ā x + √(1 − ā) ε``, as after some steps of a diffusion; the rest is as it was.

    ``ā`` is the product of ``1 − b_t`` over the steps so far, b_t rising as a sigmoid from 1e-5 to 5e-3 over 1,000 steps:
    S. Leng et al. (2023), Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
    Decoding.

    Args:
        inputs: what a processor returns.
        step: from 0 to 999.
        generator: of the noise.

    Raises:
        ValueError: no pixels; a step out of range.

    >>> import torch
    >>> noised({"pixel_values": torch.zeros(1, 3, 8, 8)})["pixel_values"].std() > 0.3
    tensor(True)
    """
    if not 0 <= step < _STEPS:
        raise ValueError(f"noised needs a step from 0 to {_STEPS - 1}, got {step}")
    pixels = {name: value for name, value in inputs.items() if name.startswith("pixel_values")}
    if not pixels:
        raise ValueError(
            f"there are no pixel_values to put noise on among {', '.join(inputs)}; pass noisy inputs yourself"
        )
    betas = torch.sigmoid(torch.linspace(-6, 6, _STEPS)) * (5e-3 - 1e-5) + 1e-5
    left = float((1 - betas)[: step + 1].prod())
    noisy = dict(inputs)
    for name, value in pixels.items():
        noise = torch.randn(value.shape, generator=generator).to(value)
        noisy[name] = left**0.5 * value + (1 - left) ** 0.5 * noise
    return noisy
