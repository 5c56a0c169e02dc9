"""What a model reads, from texts, images and recordings: its inputs, and what its tokens are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module

from regard.inputs.audio import Samples, read_audio
from regard.inputs.contrastive import is_contrastive, read_contrastive
from regard.inputs.image import image_processor_of, read_image
from regard.inputs.image_text import read_prompt, sees_in_text
from regard.inputs.reading import FoundCall, Part, Picture, Reading, Tokens, find_calls, patch_name
from regard.inputs.target import read_translation
from regard.inputs.text import read_pair, read_text, tokenizer_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "FoundCall",
    "Part",
    "Picture",
    "Reading",
    "Tokens",
    "find_calls",
    "patch_name",
    "read",
    "read_audio",
    "read_contrastive",
    "read_image",
    "read_pair",
    "read_prompt",
    "read_text",
    "read_translation",
]


def read(
    model: Module,
    processor: Any,
    text: str | None = None,
    *,
    pair: str | None = None,
    target: str | None = None,
    image: str | Path | Image | None = None,
    audio: str | Path | Samples | None = None,
    max_tokens: int | None = None,
    window: bool = False,
) -> list[Reading]:
    """What a model reads of what it is given, in one pass for each window of a long text and in one for anything else.

    Args:
        model: a transformers model.
        processor: its tokenizer, its image processor, or the processor that holds them.
        text: what it reads; for a model that sees, the prompt or the caption.
        pair: a second text, for models that compare two.
        target: what the decoder reads, for models with an encoder and a decoder.
        image: a file, or an image of Pillow, for models that see.
        audio: a .wav file, or samples, for models that listen.
        max_tokens: read so many tokens of a text and no more.
        window: cut a longer text into windows of the model's length.

    Raises:
        ValueError: what the model is not made for, or what it needs and was not given; as the functions for each.

    >>> import regard
    >>> [reading] = read(*regard.mini(), "It rained.")
    >>> reading.parts[0].name, len(reading.parts[0].keys)
    ('Text', 5)
    """
    kind = _kind(model, processor)
    given: dict[str, Any] = {"text": text, "pair": pair, "target": target, "image": image, "audio": audio}
    kind.check(type(model).__name__, {option for option, value in given.items() if value is not None})
    if window and (kind is not _TEXT or pair is not None):
        raise ValueError("--window cuts a text alone, and nothing else")
    if max_tokens is not None and kind not in (_TEXT, _TRANSLATION):
        raise ValueError(f"--max-tokens shortens texts, and {type(model).__name__} {kind.reads}")
    tokenizer: Any = tokenizer_of(processor)
    if kind is _IMAGE:
        return [read_image(model, processor, given["image"])]
    if kind is _CONTRASTIVE:
        return [read_contrastive(model, processor, text, image)]
    if kind is _PROMPT:
        return read_prompt(model, processor, given["text"], image)
    if kind is _AUDIO:
        return [read_audio(model, processor, given["audio"], target)]
    if kind is _TRANSLATION:
        return [read_translation(model, tokenizer, given["text"], target, max_tokens)]
    if pair is not None:
        return [read_pair(model, tokenizer, given["text"], pair, max_tokens)]
    return read_text(model, tokenizer, given["text"], max_tokens=max_tokens, window=window)


@dataclass(frozen=True)
class _Kind:
    """What models of a kind read: in words, which options they take, and which they need."""

    reads: str
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def check(self, name: str, given: set[str]) -> None:
        """Refuse options that a model is not made for, and ask for those that it needs."""
        wrong = sorted(given - set(self.takes) - {"text"})  # which may be the text that is read where none was given
        missing = [option for option in self.needs if option not in given]
        if wrong or (not missing and given - set(self.takes)):
            named = " and ".join(_OPTIONS[option] for option in wrong or ["text"])
            raise ValueError(f"{name} {self.reads}: leave out {named}")
        if missing:
            raise ValueError(f"{name} {self.reads}: give {_OPTIONS[missing[0]]}")


_OPTIONS = {
    "text": "--prompt or --text", "pair": "--pair", "target": "--target", "image": "--image", "audio": "--audio",
}  # fmt: skip
_TEXT = _Kind("reads texts", ("text", "pair"), ("text",))
_TRANSLATION = _Kind("makes one text of another", ("text", "target"), ("text",))
_IMAGE = _Kind("reads images alone", ("image",), ("image",))
_CONTRASTIVE = _Kind("compares images with texts", ("text", "image"))
_PROMPT = _Kind("reads texts with an image in them", ("text", "image"), ("text",))
_AUDIO = _Kind("writes what is said in a recording", ("audio", "target"), ("audio",))


def _kind(model: Any, processor: Any) -> _Kind:
    """By the model's own inputs, and by what prepares them."""
    main = getattr(model, "main_input_name", "input_ids")
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if is_contrastive(model):
        return _CONTRASTIVE
    if main == "pixel_values" and not decodes and image_processor_of(processor) is not None:
        return _IMAGE
    if main == "input_features" and decodes and tokenizer_of(processor) is not None:
        return _AUDIO
    if main == "input_ids" and tokenizer_of(processor) is not None:
        return _PROMPT if sees_in_text(model) else _TRANSLATION if decodes else _TEXT
    raise ValueError(
        f"{type(model).__name__} reads {main}, which is prepared here neither from a text, nor an image, nor a recording"
    )
