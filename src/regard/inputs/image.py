"""Images for encoders of images: their patches are the tokens."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.inputs.reading import FoundCall, Part, Picture, Reading, Tokens, find_calls, no_special, patch_name

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_SPECIAL = 16
"""More tokens before the patches than this are none of the class tokens and registers that are known."""
_WIDEST = 1024
"""A picture is shown with at most so many pixels on a side."""


def read_image(model: Module, processor: Any, image: str | Path | Image) -> Reading:
    """An image for a model that reads nothing else: ViT, DeiT, DINO, CLIP's and SigLIP's image encoder.

    Args:
        model: an encoder of images of transformers.
        processor: its image processor, or a processor that holds one.
        image: a file, or an image of Pillow.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: a file that is no image; a model whose attention is not between the patches of the whole image, as
            that of windows is not.

    >>> import numpy, transformers
    >>> from PIL.Image import fromarray
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    >>> model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    >>> processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    >>> reading = read_image(model, processor, fromarray(numpy.zeros((40, 40, 3), numpy.uint8)))
    >>> reading.parts[0].keys.names[:3]
    ('[CLS]', 'row 0, column 0', 'row 0, column 1')
    """
    pixels = pixel_values(processor, open_image(image)).to(next(model.parameters()))
    inputs = {"pixel_values": pixels}
    calls = find_calls(model, inputs)
    parts = image_parts(model, processor, pixels, calls)
    if not parts:
        height, width = patches_of(model, pixels)
        seen = ", ".join(dict.fromkeys(f"{call.queries}×{call.keys}" for call in calls)) or "none at all"
        raise ValueError(
            f"{type(model).__name__} cuts the image into {height}×{width} patches, but no attention call is between all of "
            f"them (there are {seen}): attention in windows and over merged patches is not shown"
        )
    return Reading(model, inputs, parts, calls, tuple(left_out(calls, parts)))


def image_parts(
    model: Module, processor: Any, pixels: Tensor, calls: tuple[FoundCall, ...], name: str = "Image"
) -> tuple[Part, ...]:
    """The attention between an image's patches, and where the model has it the pooling that one query makes of them.

    Args:
        model: whose config tells the size of a patch.
        processor: that made the pixels.
        pixels: (1, channels, height, width).
        calls: those of the encoder of images.
        name: of the first part.

    Returns:
        The parts; none where no call is between the patches.
    """
    height, width = patches_of(model, pixels)
    patches = height * width
    own = [call for call in calls if call.queries == call.keys and patches <= call.keys <= patches + _MOST_SPECIAL]
    if not own:
        return ()
    keys = own[0].keys
    tokens = patch_tokens(picture_of(processor, pixels, height, width, range(keys - patches, keys)), keys)
    parts = [Part(name, tokens, tokens, tuple(call.path for call in own if call.keys == keys))]
    if pooling := tuple(call.path for call in calls if call.queries == 1 and call.keys == keys):
        probe = Tokens(("[probe]",), torch.ones(1, dtype=torch.bool))
        parts.append(Part(f"{name}: pooling", probe, tokens, pooling))
    return tuple(parts)


def patch_tokens(picture: Picture, tokens: int) -> Tokens:
    """An encoder's tokens: class token and registers, then the patches."""
    first = tokens - len(picture.positions)
    before = ("[CLS]", *(f"[REG{number}]" for number in range(1, first)))[:first]
    special = no_special(tokens)
    special[:first] = True
    places = (picture.place(position) for position in picture.positions)
    return Tokens((*before, *(patch_name(*place) for place in places)), special, picture=picture)


def patch_size(model: Module) -> tuple[int, int]:
    """Height and width of a patch in pixels, as the model's config tells.

    Raises:
        ValueError: it does not.
    """
    config: Any = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(
            f"the config of {type(model).__name__} names no patch_size: only models that cut an image into patches are shown"
        )
    return int(pair[0]), int(pair[1])


def patches_of(model: Module, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of an image (1, channels, height, width)."""
    high, wide = patch_size(model)
    return pixels.shape[-2] // high, pixels.shape[-1] // wide


def image_processor_of(processor: Any) -> Any:
    """What makes pixels of an image: the processor, or the part of it that does; None where there is none."""
    part = getattr(processor, "image_processor", None)
    if part is not None:
        return part
    return processor if "pixel_values" in getattr(processor, "model_input_names", ()) else None


def pixel_values(processor: Any, image: Image) -> Tensor:
    """(1, channels, height, width), as the model's processor makes it.

    Raises:
        ValueError: the processor makes several images of it, or something else.
    """
    made = image_processor_of(processor)(images=image, return_tensors="pt").get("pixel_values")
    if not isinstance(made, Tensor) or made.ndim != 4 or made.shape[0] != 1:
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"the model's processor makes {shape} of an image; only (1, channels, height, width) is shown")
    return made


def open_image(image: str | Path | Image) -> Image:
    """An image in colours, upright as its camera was held.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: no such file, or no image in it.
    """
    try:
        from PIL import Image as Files
        from PIL import ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "regard[images]"') from error
    if not isinstance(image, str | Path):
        return image.convert("RGB")
    try:
        with Files.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{image} is no image that Pillow can read") from error
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {image}") from error


def picture_of(processor: Any, pixels: Tensor, height: int, width: int, positions: range | list[int]) -> Picture:
    """What the model saw: its pixels, (1, channels, height, width), before they were normalized."""
    from PIL.Image import fromarray

    made_by = image_processor_of(processor)
    seen = pixels[0].detach().float().cpu()
    if getattr(made_by, "do_normalize", False):
        mean, deviation = (torch.tensor(getattr(made_by, name))[:, None, None] for name in ("image_mean", "image_std"))
        seen = seen * deviation + mean
    if getattr(made_by, "do_rescale", True):
        seen = seen * 255
    picture = fromarray(seen.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
    return Picture(png_of(picture), height, width, tuple(positions))


def png_of(image: Image) -> bytes:
    """A PNG file of an image, no larger than a page needs it."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((_WIDEST, _WIDEST))
    small.save(file, "PNG")
    return file.getvalue()


def grid_of(patches: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of so many tokens, where each stands for a square of patches of the image; None if none can.

    >>> grid_of((24, 16), 96), grid_of((24, 16), 100)
    ((12, 8), None)
    """
    height, width = patches
    side = math.isqrt(height * width // tokens) if tokens else 0
    if not side or height % side or width % side or (height // side) * (width // side) != tokens:
        return None
    return height // side, width // side


def left_out(calls: tuple[FoundCall, ...], parts: tuple[Part, ...]) -> list[str]:
    """A line on the calls that belong to no part, if there are any."""
    shown = {path for part in parts for path in part.layers or ()}
    others = [call for call in calls if call.path not in shown]
    if not others:
        return []
    first = others[0]
    return [f"not shown: {len(others)} calls over other tokens, such as {first.path}, {first.queries}×{first.keys}"]
