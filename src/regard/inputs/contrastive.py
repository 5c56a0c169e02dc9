"""Images and texts for models that compare them, each by an encoder of its own: CLIP, SigLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from regard.inputs.image import image_parts, left_out, open_image, pixel_values, read_image
from regard.inputs.reading import Part, Reading, find_calls
from regard.inputs.text import text_tokens
from regard.tokens import max_positions

if TYPE_CHECKING:
    from PIL.Image import Image

_VISION, _TEXT = "vision_model", "text_model"


def is_contrastive(model: Module) -> bool:
    """Whether a model has an encoder for images and one for texts, side by side."""
    return all(isinstance(getattr(model, name, None), Module) for name in (_VISION, _TEXT))


def read_contrastive(model: Any, processor: Any, text: str | None, image: str | Path | Image | None) -> Reading:
    """An image, a text or both, of which only the encoders run that are needed.

    Args:
        model: such as CLIP or SigLIP of transformers.
        processor: with its tokenizer and its image processor.
        text: a caption, or None.
        image: a file, an image of Pillow, or None.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: neither a text nor an image; a text longer than the model's positions; as `read_image`.
    """
    if text is None:
        if image is None:
            raise ValueError(f"{type(model).__name__} reads an image, a text or both: give --image, --prompt or --text")
        reading = read_image(model.vision_model, processor, image)
        return replace(reading, notes=(*reading.notes, "no text was given: the encoder of images alone is shown"))
    if not text.strip():
        raise ValueError("the text is empty")
    tokenizer = processor.tokenizer
    # SigLIP was trained with texts filled up to one length, and sees the filling.
    filled = {"padding": "max_length"} if model.config.model_type.startswith("siglip") else {}
    limit = max_positions(model, tokenizer)
    inputs = dict(tokenizer(text, return_tensors="pt", verbose=False, **({"max_length": limit} | filled)))
    if (tokens := inputs["input_ids"].shape[1]) > limit:
        raise ValueError(
            f"the text has {tokens:,} tokens, but the model has positions for {limit:,}; give a caption by --prompt, or an "
            "--image alone"
        )
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    words = text_tokens(tokenizer, inputs["input_ids"])
    if image is None:
        note = "no --image was given: the encoder of texts alone is shown"
        return Reading(model.text_model, inputs, (Part("Text", words, words),), notes=(note,))
    pixels = pixel_values(processor, open_image(image)).to(next(model.parameters()))
    both = {**inputs, "pixel_values": pixels}
    calls = find_calls(model, both)
    of_image = tuple(call for call in calls if call.path.startswith(f"{_VISION}."))
    of_text = tuple(
        call.path for call in calls if call.path.startswith(f"{_TEXT}.") and call.queries == call.keys == len(words)
    )
    parts = (*image_parts(model, processor, pixels, of_image), Part("Text", words, words, of_text))
    return Reading(model, both, parts, calls, tuple(left_out(calls, parts)))
