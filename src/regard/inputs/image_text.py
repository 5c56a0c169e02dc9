"""Prompts with an image in them, for language models that see: LLaVA, Qwen-VL, Gemma 3 and their like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from regard.inputs.image import (
    grid_of,
    image_parts,
    image_processor_of,
    left_out,
    open_image,
    patches_of,
    picture_of,
    png_of,
)
from regard.inputs.reading import FoundCall, Part, Picture, Reading, Tokens, find_calls, patch_name
from regard.inputs.text import read_text, text_tokens, tokenizer_of
from regard.tokens import decoder_of, image_tokens, max_positions

if TYPE_CHECKING:
    from PIL.Image import Image


def sees_in_text(model: Module) -> bool:
    """Whether a model has tokens in its texts that stand for an image."""
    try:
        image_tokens(model)
    except ValueError:
        return False
    return True


def read_prompt(model: Any, processor: Any, text: str, image: str | Path | Image | None) -> list[Reading]:
    """A prompt and an image: the language model's attention over both, and that of its encoder of images.

    Args:
        model: a language model of transformers that sees.
        processor: with its tokenizer and its image processor.
        text: the prompt; where it does not say where the image stands, it is put where the chat template or, without
            one, the beginning has it.
        image: a file, an image of Pillow, or None.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: an empty text; a processor without an image processor; a prompt longer than the model's positions.
    """
    if image is None:
        note = f"no --image was given: {type(model).__name__} reads the text alone"
        return [replace(reading, notes=(note,)) for reading in read_text(model, tokenizer_of(processor), text)]
    if not text.strip():
        raise ValueError("the text is empty")
    if image_processor_of(processor) is None:
        raise ValueError(f"{type(model).__name__} came without an image processor: it can read no --image")
    prompt, notes = _with_image(processor, text)
    opened = open_image(image)
    made = processor(images=opened, text=prompt, return_tensors="pt")
    dtype = next(model.parameters()).dtype
    inputs = {
        name: values.to(model.device, dtype if values.is_floating_point() else values.dtype)
        for name, values in made.items()
        if isinstance(values, Tensor)
    }
    ids = inputs["input_ids"]
    if ids.shape[1] > (limit := max_positions(model, processor.tokenizer)):
        raise ValueError(f"prompt and image have {ids.shape[1]:,} tokens, but the model has positions for {limit:,}")
    calls = find_calls(model, inputs)
    tokens, more = _prompt_tokens(model, processor, inputs, opened)
    inside = _path_of(model, decoder_of(model))
    of_text = [call for call in calls if call.path.startswith(inside)]
    own = tuple(call.path for call in of_text if call.queries == call.keys == len(tokens))
    tower = tuple(call for call in calls if not call.path.startswith(inside))
    parts = (Part("Prompt and image", tokens, tokens, own), *_tower_parts(model, processor, inputs, tower))
    return [Reading(model, inputs, parts, calls, (*notes, *more, *left_out(calls, parts)))]


def _with_image(processor: Any, text: str) -> tuple[str, list[str]]:
    """The prompt with the place of its image, and a line on where that is, if it was not said."""
    mark = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
    if mark and mark in text:
        return text, []
    if getattr(processor, "chat_template", None):
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(said, add_generation_prompt=True)
        return prompt, ["the prompt is what the model's chat template makes of image and text"]
    if not mark:
        raise ValueError(f"{type(processor).__name__} names no image token: write the image's place into the prompt")
    return f"{mark}\n{text}", [f"the image stands before the prompt; write {mark} to have it elsewhere"]


def _prompt_tokens(model: Module, processor: Any, inputs: dict[str, Tensor], image: Image) -> tuple[Tokens, list[str]]:
    """The prompt's tokens, of which those of the image are called by their patches, where their grid is known."""
    ids = inputs["input_ids"]
    words = text_tokens(processor.tokenizer, ids)
    positions = image_tokens(model)(ids.cpu())[0].nonzero()[:, 0].tolist()
    if not positions:
        raise ValueError("the processor made no image token of the prompt, so that the image is nowhere in it")
    special = words.special.clone()
    special[positions] = False
    others = [at for at in range(len(words)) if at not in set(positions) and not special[at]]
    segments = {"image": positions, "text": others}
    picture, notes = _picture(model, processor, inputs, positions, image), []
    names = list(words.names)
    for number, position in enumerate(positions):
        names[position] = patch_name(*picture.place(position)) if picture else f"image token {number}"
    if picture is None:
        notes = [
            f"how the {len(positions)} image tokens lie on the image is not known: they are called by their numbers"
        ]
    return replace(words, names=tuple(names), special=special, segments=segments, picture=picture), notes


def _picture(
    model: Any, processor: Any, inputs: dict[str, Tensor], positions: list[int], image: Image
) -> Picture | None:
    """The image with the grid of its tokens; None where it was cut into tiles, or otherwise, so that there is none."""
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if sizes is not None and sizes.shape[0] == 1:  # Qwen-VL: patches in rows of their own, the image whole
        grid = grid_of((int(sizes[0, 1]), int(sizes[0, 2])), len(positions))
        return None if grid is None else Picture(png_of(image), *grid, tuple(positions))
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[0] != 1:
        return None
    grid = grid_of(patches_of(model, pixels), len(positions))
    return None if grid is None else picture_of(processor, pixels, *grid, positions)


def _tower_parts(
    model: Module, processor: Any, inputs: dict[str, Tensor], calls: tuple[FoundCall, ...]
) -> tuple[Part, ...]:
    """The encoder of images, where it is given one image whole."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[0] != 1:
        return ()
    return image_parts(model, processor, pixels, calls, "Image encoder")


def _path_of(model: Module, part: Module) -> str:
    """How paths of a part's modules begin."""
    path = next(name for name, module in model.named_modules() if module is part)
    return f"{path}." if path else ""
