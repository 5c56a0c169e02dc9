"""Small random models that see images: one shaped like LLaVA, one like Qwen2-VL."""

from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
import transformers as hf
from torch import Tensor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SMALL | {
    "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
IMAGE = 59
WORDS = 56  # ids below are text

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class Seer:
    """A model, one prompt for it, and where the image and the question stand."""

    name: str
    model: torch.nn.Module
    inputs: dict[str, Tensor]
    image: slice
    question: slice

    def generate(self, **arguments: Any) -> Tensor:
        words = {"suppress_tokens": [*range(WORDS, 60)]}  # a random model would write image tokens
        return self.model.generate(**self.inputs, max_new_tokens=4, do_sample=False, **words, **arguments)

    def scores(self, **arguments: Any) -> Tensor:
        """The scores of each token that is generated, (steps, batch, words)."""
        told: Any = self.generate(return_dict_in_generate=True, output_scores=True, **arguments)
        return torch.stack(told.scores)[..., :WORDS]

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(**self.inputs).logits[..., :WORDS]


def widened(model: Model) -> Model:
    for parameter in model.parameters():  # wide enough weights for attention that is not nearly uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompt(image: int, batch: int = 1) -> Tensor:
    ids = torch.randint(3, 55, (batch, image + 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    ids[:, 2 : 2 + image] = IMAGE
    return ids


def llava() -> Seer:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4, projection_dim=16)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1
    )
    model = widened(hf.LlavaForConditionalGeneration(config))
    inputs = {"input_ids": prompt(16), "pixel_values": torch.randn(1, 3, 16, 16)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return Seer("llava", model, inputs, slice(2, 18), slice(18, 22))


def qwen() -> Seer:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=58, vision_start_token_id=57, vision_end_token_id=56,
    )  # fmt: skip
    model = widened(hf.Qwen2VLForConditionalGeneration(config))
    ids = prompt(16)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return Seer("qwen2-vl", model, inputs, slice(2, 18), slice(18, 22))


@pytest.fixture(params=[llava, qwen], ids=["llava", "qwen2-vl"], scope="module")
def seer(request: pytest.FixtureRequest) -> Seer:
    return request.param()
