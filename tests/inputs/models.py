"""Small random models that read more than text, and what prepares their inputs, made without a network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL.Image import Image, fromarray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import Module

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MARKS = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "<|start|>"]
TEXT = "a picture of the red cat and dog what is in it ? it rained all day . he slept user :"
VOCABULARY = list(dict.fromkeys([*MARKS, *TEXT.split()]))
PATCH = 4


def tokenizer(begins: str = "<s>", ends: str = "</s>") -> Any:
    """One token a word; a text stands between a beginning and an end, and so do two with an end between them."""
    pieces = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{begins} $A {ends}",
        pair=f"{begins} $A {ends} $B:1 {ends}:1",
        special_tokens=[(mark, VOCABULARY.index(mark)) for mark in dict.fromkeys((begins, ends))],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        model_max_length=64,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token=begins,
        eos_token=ends,
        additional_special_tokens=["<image>", "<|start|>"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def sharp(model: Module) -> Any:
    """The model with weights by which its attention is far from even."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(height: int = 40, width: int = 40) -> Image:
    """A picture of noise."""
    return fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def vit() -> tuple[Any, Any]:
    size = {"height": 16, "width": 16}
    return sharp(hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=PATCH))), hf.ViTImageProcessorPil(
        size=size
    )


def clip_vision() -> tuple[Any, Any]:
    return sharp(hf.CLIPVisionModel(clip_vision_config())), clip_image_processor()


def clip_vision_config(projection: int = 16) -> Any:
    return hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=PATCH, projection_dim=projection)


def clip_image_processor() -> Any:
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def dinov2(rows: int = 3, columns: int = 5) -> tuple[Any, Any]:
    """With registers, and a grid that is no square."""
    config = hf.Dinov2WithRegistersConfig(**SMALL, image_size=16, patch_size=PATCH, num_register_tokens=4)
    size = {"height": rows * PATCH, "width": columns * PATCH}
    return sharp(hf.Dinov2WithRegistersModel(config)), hf.BitImageProcessorPil(size=size, do_center_crop=False)


def siglip_vision() -> tuple[Any, Any]:
    """Without a class token; its head pools by one query."""
    config = hf.SiglipVisionConfig(**SMALL, image_size=16, patch_size=PATCH)
    size = {"height": 16, "width": 16}
    return sharp(hf.SiglipVisionModel(config)), hf.SiglipImageProcessorPil(size=size)


def swin() -> tuple[Any, Any]:
    """Attention in windows."""
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    return sharp(hf.SwinModel(config)), hf.ViTImageProcessorPil(size={"height": 16, "width": 16})


def clip() -> tuple[Any, Any]:
    text = hf.CLIPTextConfig(**SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=16, eos_token_id=3)
    config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=clip_vision_config().to_dict(), projection_dim=16)
    return sharp(hf.CLIPModel(config)), hf.CLIPProcessor(clip_image_processor(), tokenizer())


def llava() -> tuple[Any, Any]:
    text = hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(VOCABULARY), max_position_embeddings=64)
    config = hf.LlavaConfig(
        vision_config=clip_vision_config(), text_config=text, image_token_index=VOCABULARY.index("<image>")
    )
    processor = hf.LlavaProcessor(
        clip_image_processor(), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    return sharp(hf.LlavaModel(config)), processor


def t5() -> tuple[Any, Any]:
    config = hf.T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=1, eos_token_id=3,
    )  # fmt: skip
    return sharp(hf.T5ForConditionalGeneration(config)), tokenizer()


def bart() -> tuple[Any, Any]:
    config = hf.BartConfig(
        vocab_size=len(VOCABULARY), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        decoder_start_token_id=3, eos_token_id=3, bos_token_id=2, pad_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return sharp(hf.BartForConditionalGeneration(config)), tokenizer()


def bert() -> tuple[Any, Any]:
    return sharp(
        hf.BertModel(hf.BertConfig(**SMALL, vocab_size=len(VOCABULARY), max_position_embeddings=64))
    ), tokenizer()


def whisper() -> tuple[Any, Any]:
    """Of 2 s at once, in 100 frames."""
    start, end = VOCABULARY.index("<|start|>"), VOCABULARY.index("</s>")
    config = hf.WhisperConfig(
        vocab_size=len(VOCABULARY), num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=100, max_target_positions=32, decoder_start_token_id=start, bos_token_id=end,
        eos_token_id=end, pad_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    extractor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer(begins="<|start|>"))
    return sharp(hf.WhisperForConditionalGeneration(config)), processor


def sound(seconds: float, rate: int = 16_000) -> np.ndarray:
    """A tone, from −1 to 1."""
    samples: np.ndarray = np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate).astype(np.float32) / 2
    return samples
