"""Texts as a model reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Encoded:
    """What a model reads of a text: ``inputs``, its arguments (1, tokens), and which tokens are ``special`` (tokens,)."""

    inputs: dict[str, Tensor]
    special: Tensor


def encode(
    model: Module,
    tokenizer: Any,
    text: str,
    *,
    max_tokens: int | None = None,
    window: bool = False,
    room: int = 0,
    add_special_tokens: bool = True,
) -> list[Encoded]:
    """The tokens of a text, on the model's device, in windows that it can read; without ``window`` there is one.

    Args:
        model: a transformers model.
        tokenizer: its fast tokenizer. The special tokens that it puts around a text stand around each window.
        text: of any length, with ``window``.
        max_tokens: read so many tokens, special ones included, and no more.
        window: cut a longer text into windows of the model's length.
        room: how many tokens are to be written after the text.
        add_special_tokens: have the tokenizer put its special tokens around the text; not where it has them, as after
            `chat_text`.

    Raises:
        ValueError: an empty text; one with half of a surrogate pair, which stands for no character; one longer than the
            model's positions, without ``window``; fewer ``max_tokens`` than leave one for the text.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> (encoded,) = encode(model, tokenizer, "It rained all day.", max_tokens=4)
    >>> tokenizer.decode(encoded.inputs["input_ids"][0])
    '<s>It rained'
    """
    _check_text(text)
    whole = tokenizer(text, return_special_tokens_mask=True, add_special_tokens=add_special_tokens, verbose=False)
    ids, special = whole["input_ids"], whole["special_tokens_mask"]
    inner = [number for number, mark in enumerate(special) if not mark]
    if not inner:
        raise ValueError(f"the tokenizer makes no token of the text {text[:20]!r}")
    before, content, after = ids[: inner[0]], ids[inner[0] : inner[-1] + 1], ids[inner[-1] + 1 :]
    around, limit = len(before) + len(after), max_positions(model, tokenizer)
    tokens = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    if tokens <= around:
        raise ValueError(
            f"max_tokens is {max_tokens}, but the tokenizer puts {around} special tokens around every text"
        )
    if tokens + room > limit and not window:
        raise ValueError(_too_long(tokens, room, limit))
    device = next(model.parameters()).device
    return [
        Encoded(
            inputs={
                "input_ids": torch.tensor([[*before, *part, *after]], device=device),
                "attention_mask": torch.ones(1, around + len(part), dtype=torch.long, device=device),
            },
            special=torch.tensor([True] * len(before) + [False] * len(part) + [True] * len(after), device=device),
        )
        for part in _parts(content, max_tokens, around, limit)
    ]


def max_positions(model: Module, tokenizer: Any) -> int:
    """The most tokens that the model reads at once, as its config and its tokenizer tell."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    of_model = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    return int(min(of_model, tokenizer.model_max_length))


def _check_text(text: str) -> None:
    if not text.strip():
        raise ValueError("the text is empty")
    if half := re.search(r"[\ud800-\udfff]", text):
        raise ValueError(
            f"the text holds {half.group()!r} at character {half.start()}, half of a surrogate pair, which stands for no "
            'character; read its file with errors="replace"'
        )


def _parts(content: list[int], max_tokens: int | None, around: int, limit: int) -> list[list[int]]:
    """The text's own tokens, cut so that with those around each part none is longer than the limit, nor all than asked."""
    most = limit - around
    if max_tokens is not None:
        windows, rest = divmod(max_tokens, limit)
        content = content[: windows * most + max(rest - around, 0)]
    return [content[start : start + most] for start in range(0, len(content), most)]


def _too_long(tokens: int, room: int, limit: int) -> str:
    if room:
        return (
            f"the text has {tokens:,} tokens, and {room} are to be written, but the model has positions for {limit:,}"
        )
    return (
        f"the text has {tokens:,} tokens, but the model has positions for {limit:,}; "
        f"pass --window to read it in windows of {limit:,}, or --max-tokens {limit} to read its beginning"
    )
