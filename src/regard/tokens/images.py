"""Where in a prompt the image stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class ImageTokens:
    """The tokens whose id is one of ``ids``: a function of token ids, for the keys and queries of any edit.

    Args:
        ids: of the placeholder tokens that a processor writes, one for each image token.

    >>> import torch
    >>> ImageTokens((59,))(torch.tensor([[1, 59, 59, 7]]))
    tensor([[False,  True,  True, False]])
    """

    ids: tuple[int, ...]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(batch, tokens) boolean."""
        return torch.isin(token_ids, torch.tensor(self.ids, device=token_ids.device))


@dataclass(frozen=True)
class AfterImage:
    """The tokens that come after the last one whose id is among ``ids``: the question, and what ``generate`` adds.

    >>> import torch
    >>> AfterImage((59,))(torch.tensor([[1, 59, 59, 7, 8]]))
    tensor([[False, False, False,  True,  True]])
    """

    ids: tuple[int, ...]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(batch, tokens) boolean."""
        image = ImageTokens(self.ids)(token_ids)
        return image.flip(1).cumsum(1).flip(1) == 0


def image_tokens(model: Module) -> ImageTokens:
    """The image and video tokens of a transformers model, as its config names them.

    Raises:
        ValueError: the config names none, as a text model's.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> image_tokens(model)
    ImageTokens(ids=(59,))
    >>> with torch.no_grad(), regard.steer(model, regard.Reweight(keys=image_tokens(model), by=2)):
    ...     _ = model(input_ids=torch.tensor([[1, 59, 59, 7]]))
    """
    config = getattr(model, "config", None)
    found = dict.fromkeys(
        number for name in _NAMES if isinstance(number := getattr(config, name, None), int) and number >= 0
    )
    if not found:
        raise ValueError(
            f"the config of {type(model).__name__} names no image token ({', '.join(_NAMES)}); if the model has some, "
            "say which: regard.tokens.ImageTokens((token_id,))"
        )
    return ImageTokens(tuple(found))
