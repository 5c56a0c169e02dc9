"""Small models that see images, with prompts that differ from text to text."""

from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from tests.steer.vision.conftest import IMAGE, TEXT, Seer, llava, qwen, widened

SEERS = {"llava": llava, "qwen2-vl": qwen}


def reader() -> hf.PreTrainedModel:
    """A language model that is told of image tokens, and sees them as words."""
    torch.manual_seed(0)
    return widened(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, image_token_id=IMAGE)))


def deep(seer: Seer, layers: int = 7) -> Seer:
    """The model with an encoder of so many layers."""
    torch.manual_seed(3)
    config = seer.model.config
    config.vision_config = type(config.vision_config)(
        **(config.vision_config.to_dict() | {("depth" if seer.name == "qwen2-vl" else "num_hidden_layers"): layers})
    )
    return replace(seer, model=widened(type(seer.model)(config)))


def pair(seer: Seer) -> dict[str, Tensor]:
    """The prompt, and one with two words less and another image, padded on the left."""
    other = torch.randn(seer.inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(7))
    both: dict[str, Tensor] = {}
    for name, value in seer.inputs.items():
        second = other if name == "pixel_values" else value
        if value.shape[-1] == 22:
            second = functional.pad(value[:, :20], (2, 0))
        both[name] = torch.cat([value, second])
    return both


def generate(seer: Seer, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    words = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [*range(56, 60)]}
    return seer.model.generate(**inputs, **(words | options))
