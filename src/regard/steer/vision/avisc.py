"""Attentional vision calibration: the next token, less what the model would say of the few tokens that it stares at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.steer.vision._branch import Branch, check_beta, last_gaze, plausible
from regard.steer.vision._prompt import Inputs, read_prompt
from regard.tokens import decoder_of


class AvisC:
    """A logits processor for ``generate``: ``ℓ' = (1 + α) ℓ − α ℓ*``, ℓ* from the image's blind tokens alone.

    The other image tokens' embeddings are zeroed for ℓ*; `blind_tokens` tells which are blind. Tokens whose probability is
    below β of the likeliest one's, by ℓ, are ruled out. S. Woo, D. Kim, J. Jang, Y. Choi, C. Kim (2024), Don't Miss the
    Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models.

    As in the authors' code the blind tokens are found once, at the first token that is generated. Left out: other ways to
    put tokens out of action (ones, noise, a mask), which the paper compares. Made for one prompt or batch of prompts,
    without beam search; it may be used again for the same.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns, and ``generate`` is given.
        alpha: the authors take 2.5 for LLaVA-1.5, 3 for InstructBLIP.
        beta: greater than 0, at most 1.
        gamma: of `blind_tokens`.
        deviations: λ of `blind_tokens`.

    Raises:
        ValueError: β out of range; no image token; when called, a text that does not go on with the prompt.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}
    >>> model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, logits_processor=[AvisC(model, inputs)]).shape
    torch.Size([1, 8])
    """

    def __init__(
        self,
        model: Module,
        inputs: Inputs,
        alpha: float = 2.5,
        beta: float = 0.1,
        gamma: float = 0.5,
        deviations: float = 1.0,
    ) -> None:
        check_beta("AvisC", beta)
        self.alpha, self.beta = alpha, beta
        self.blind = blind_tokens(model, inputs, gamma, deviations)
        kept = ~read_prompt(model, inputs).image | self.blind
        self._branch = Branch(model, inputs, lambda: _zeroed(model, kept))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The calibrated scores (batch, vocabulary)."""
        contrast = (1 + self.alpha) * scores - self.alpha * self._branch(input_ids).to(scores)
        return plausible(contrast, scores, self.beta)


def blind_tokens(model: Module, inputs: Inputs, gamma: float = 0.5, deviations: float = 1.0) -> Tensor:
    """The image tokens that get far more attention than the others when the first token is generated: (batch, tokens).

    Those of the layers that attend to the image most: the fewest whose shares of all layers' attention to it reach γ. There,
    on the mean over layers and heads, a token is blind that gets more than the image's mean by λ standard deviations.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        gamma: γ, from 0 to 1.
        deviations: λ.

    Raises:
        ValueError: γ out of range; no image token.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> blind_tokens(model, {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}).shape
    torch.Size([1, 6])
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"blind_tokens needs gamma to be from 0 to 1, got {gamma}")
    image = read_prompt(model, inputs).image
    return stared_at(last_gaze(model, inputs) * image, image, gamma, deviations)


def stared_at(gaze: Tensor, image: Tensor, gamma: float, deviations: float) -> Tensor:
    """Blind tokens (batch, tokens) by the attention to the image, (layers, batch, tokens), which is 0 elsewhere."""
    share = gaze.sum(dim=-1) / gaze.sum(dim=(0, 2))
    ordered = share.sort(dim=0, descending=True)
    among = ordered.values.cumsum(dim=0) - ordered.values < gamma  # until γ is reached
    among[0] = True
    chosen = torch.zeros_like(among).scatter(0, ordered.indices, among)
    mean = (gaze * chosen[..., None]).sum(dim=0) / chosen.sum(dim=0)[:, None]
    blind = torch.zeros_like(image)
    for row, (values, of_image) in enumerate(zip(mean, image, strict=True)):
        among_image = values[of_image]
        blind[row] = of_image & (values > among_image.mean() + deviations * among_image.std())
    return blind


@contextmanager
def _zeroed(model: Module, kept: Tensor) -> Iterator[None]:
    """Let the language model see zeros in the place of some tokens of the prompt."""
    decoder: Any = decoder_of(model)

    def zero(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None:
            embeddings = decoder.get_input_embeddings()(kwargs["input_ids"])
        if embeddings.shape[:2] == kept.shape:
            kwargs = kwargs | {"input_ids": None, "inputs_embeds": embeddings * kept[..., None].to(embeddings.device)}
        return args, kwargs

    hook = decoder.register_forward_pre_hook(zero, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
