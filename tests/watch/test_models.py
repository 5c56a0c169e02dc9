"""Statistics read while models run are those of the matrices that eager attention returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import regard

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SMALL | TEXT | {"num_key_value_heads": 2, "head_dim": 8}


def ids(tokens: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(3, 60, (batch, tokens))


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size)


@dataclass
class Case:
    """A model, its inputs, and the outputs that hold its stored matrices, by the kind of path they belong to."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    stored: dict[str, str] = field(default_factory=lambda: {"": "attentions"})


def t5() -> torch.nn.Module:
    config = hf.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def bart() -> torch.nn.Module:
    config = hf.BartConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def whisper() -> torch.nn.Module:
    config = hf.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def llava() -> torch.nn.Module:
    vision = hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4, projection_dim=16)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**GROUPED), image_token_index=59, image_token_id=59,
        vision_feature_layer=-1,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def llava_inputs() -> dict[str, Tensor]:
    prompt = torch.randint(3, 58, (2, 20))
    prompt[:, 2:18] = 59
    return {"input_ids": prompt, "pixel_values": pixels()}


def clip_inputs() -> dict[str, Tensor]:
    return {"input_ids": ids(10), "pixel_values": pixels()}


def clip() -> torch.nn.Module:
    config = hf.CLIPConfig(
        text_config=SMALL | TEXT | {"projection_dim": 16},
        vision_config=SMALL | {"image_size": 16, "patch_size": 4, "projection_dim": 16},
        projection_dim=16,
    )
    return hf.CLIPModel(config)


ENCODER_DECODER = {"encoder": "encoder_attentions", "self": "decoder_attentions", "cross": "cross_attentions"}
CASES = {
    "bert": Case(lambda: hf.BertModel(hf.BertConfig(**SMALL, **TEXT)), lambda: {"input_ids": ids()}),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        lambda: {"input_ids": ids()},
    ),
    "llama": Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), lambda: {"input_ids": ids()}),
    "mistral": Case(
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5)), lambda: {"input_ids": ids()}
    ),
    "gemma3": Case(
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **GROUPED,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
                query_pre_attn_scalar=8,
            )
        ),
        lambda: {"input_ids": ids()},
    ),
    "qwen3": Case(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)), lambda: {"input_ids": ids()}),
    "t5": Case(t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(7)}, ENCODER_DECODER),
    "bart": Case(bart, lambda: {"input_ids": ids(), "decoder_input_ids": ids(7)}, ENCODER_DECODER),
    "vit": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=4)), lambda: {"pixel_values": pixels()}
    ),
    "clip": Case(
        clip,
        clip_inputs,
        {"text_model": "text_model_output.attentions", "vision_model": "vision_model_output.attentions"},
    ),
    "whisper": Case(
        whisper, lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(7)}, ENCODER_DECODER
    ),
    "llava": Case(llava, llava_inputs, {"language_model": "attentions"}),
}


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    for parameter in model.parameters():  # wide enough weights for attention that is not nearly uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def set_attention(model: torch.nn.Module, implementation: str) -> None:
    """In each part by itself: transformers 5.18 leaves T5's stacks as they are."""
    for part in model.modules():
        if isinstance(part, hf.PreTrainedModel):
            part.set_attn_implementation(implementation)


def stored(model: torch.nn.Module, name: str, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    set_attention(model, "eager")
    with torch.no_grad():
        output: Any = model(**inputs, output_attentions=True)
    set_attention(model, "sdpa")
    found = {}
    for kind, attribute in CASES[name].stored.items():
        value = output
        for part in attribute.split("."):
            value = getattr(value, part)
        found[kind] = list(value)
    return found


def kind_of(path: str, kinds: list[str]) -> str | None:
    """Which of the model's outputs holds the matrices of the call at this path."""
    if set(kinds) == set(ENCODER_DECODER):
        if "decoder" not in path:
            return "encoder"
        crosses = "encoder_attn" in path or "EncDecAttention" in path
        return "cross" if crosses else "self"
    return next((kind for kind in kinds if kind in path), None)


def check(seen: regard.Recording, matrices: dict[str, list[Tensor]]) -> None:
    data = seen.dataset()
    remaining = {kind: list(of_kind) for kind, of_kind in matrices.items()}
    for layer in seen.layers:
        kind = kind_of(layer, list(matrices))
        if kind is None:
            continue
        matrix = remaining[kind].pop(0).double().numpy()
        batch, heads, queries, keys = matrix.shape
        here = data.sel(layer=layer)
        entropy = -(matrix * np.log(np.maximum(matrix, 1e-300))).sum(-1)
        np.testing.assert_allclose(here.entropy[:, :, :queries], entropy, atol=2e-5)
        np.testing.assert_allclose(here.received[:, :, :keys], matrix.sum(2), atol=2e-5)
        np.testing.assert_allclose(here.mass.sel(segment="first")[:, :, :queries], matrix[..., 0], atol=1e-5)
        distance = (matrix * np.abs(np.arange(queries)[:, None] - np.arange(keys))).sum(-1)
        np.testing.assert_allclose(here.mean_distance[:, :, :queries], distance, atol=1e-4)
        np.testing.assert_allclose(here.topk_share[:, :, :queries, 0], matrix.max(-1), atol=1e-5)
        assert here.sizes["batch"] == batch
        assert here.sizes["head"] == heads
        assert here.entropy[:, :, queries:].isnull().all()
        assert here.received[:, :, keys:].isnull().all()
    assert not any(remaining.values()), f"matrices of calls that were not seen: {remaining.keys()}"


STATISTICS = (
    regard.Entropy(),
    regard.Received(),
    regard.Mass({"first": [0]}),
    regard.MeanDistance(),
    regard.TopK(1),
)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_stored_matrices(name: str) -> None:
    model, inputs = built(name), CASES[name].inputs()
    matrices = stored(model, name, inputs)
    with torch.no_grad():
        plain = model(**inputs)
        with regard.watch(model, *STATISTICS) as seen:
            watched = model(**inputs)
    check(seen, matrices)
    for one, other in zip(plain.to_tuple(), watched.to_tuple(), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma3"])
def test_padded_batch(name: str) -> None:
    model = built(name)
    mask = torch.ones(2, 12, dtype=torch.long)
    if name == "bert":
        mask[0, 8:] = 0
    else:
        mask[0, :4] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    matrices = [matrix.double().numpy() for matrix in stored(model, name, inputs)[""]]
    with torch.no_grad(), regard.watch(model, regard.Entropy(), regard.Received(), token_mask=mask) as seen:
        model(**inputs)
    data = seen.dataset()
    real = mask.bool().numpy()
    for layer, matrix in zip(seen.layers, matrices, strict=True):
        entropy = -(matrix * np.log(np.maximum(matrix, 1e-300))).sum(-1).swapaxes(0, 1)
        here = data.sel(layer=layer)
        np.testing.assert_allclose(here.entropy.values.swapaxes(0, 1)[:, real], entropy[:, real], atol=2e-5)
        assert np.isnan(here.entropy.values.swapaxes(0, 1)[:, ~real]).all()
        received = (matrix * real[:, None, :, None]).sum(2)
        np.testing.assert_allclose(here.received, received, atol=2e-5)
