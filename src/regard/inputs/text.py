"""Texts, alone and in pairs: their tokens are a tokenizer's pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.inputs.reading import Part, Reading, Tokens
from regard.tokens import encode, max_positions, spelling_of

FIRST, SECOND = "first text", "second text"


def read_text(
    model: Module, tokenizer: Any, text: str, *, max_tokens: int | None = None, window: bool = False
) -> list[Reading]:
    """A text, in as many readings as it has windows.

    Args:
        model: a transformers model.
        tokenizer: its fast tokenizer.
        text: of any length, with ``window``.
        max_tokens: read so many tokens, special ones included, and no more.
        window: cut a longer text into windows of the model's length.

    Raises:
        ValueError: as `regard.tokens.encode`.

    >>> import regard
    >>> (reading,) = read_text(*regard.mini(), "It rained all day.", max_tokens=4)
    >>> reading.parts[0].keys.names
    ('<s>', 'It', 'Ġr', 'ained')
    """
    readings = []
    for encoded in encode(model, tokenizer, text, max_tokens=max_tokens, window=window):
        tokens = text_tokens(tokenizer, encoded.inputs["input_ids"], encoded.special)
        readings.append(Reading(model, encoded.inputs, (Part("Text", tokens, tokens),)))
    return readings


def read_pair(model: Module, tokenizer: Any, text: str, pair: str, max_tokens: int | None = None) -> Reading:
    """Two texts read together, as cross-encoders compare them.

    Args:
        model: a transformers model.
        tokenizer: its fast tokenizer, which says how two texts stand together.
        text: the first one.
        pair: the second one.
        max_tokens: shorten the longer text until both have so many tokens, special ones included.

    Raises:
        ValueError: an empty text; two that together are longer than the model's positions.

    >>> import regard
    >>> reading = read_pair(*regard.mini(), "It rained.", "They slept.")
    >>> [len(positions) for positions in reading.parts[0].keys.segments.values()]
    [4, 4]
    """
    for which, content in ((FIRST, text), (SECOND, pair)):
        if not content.strip():
            raise ValueError(f"the {which} is empty")
    shortened = {} if max_tokens is None else {"truncation": "longest_first", "max_length": max_tokens}
    both = tokenizer(text, pair, return_special_tokens_mask=True, verbose=False, **shortened)
    length, limit = len(both["input_ids"]), max_positions(model, tokenizer)
    if length > limit:
        raise ValueError(
            f"the two texts have {length:,} tokens together, but the model has positions for {limit:,}; pass --max-tokens "
            f"{limit} to shorten the longer one"
        )
    owners = both.sequence_ids(0)
    segments = {
        name: [at for at, owner in enumerate(owners) if owner == number] for number, name in enumerate((FIRST, SECOND))
    }
    if empty := [name for name, positions in segments.items() if not positions]:
        raise ValueError(f"the tokenizer makes no token of the {empty[0]}, or max_tokens={max_tokens} leaves it none")
    device = next(model.parameters()).device
    special = torch.tensor(both.pop("special_tokens_mask"), dtype=torch.bool)
    inputs = {name: torch.tensor([values], device=device) for name, values in both.items()}
    tokens = text_tokens(tokenizer, inputs["input_ids"], special, segments)
    return Reading(model, inputs, (Part("Two texts", tokens, tokens),))


def text_tokens(
    tokenizer: Any, ids: Tensor, special: Tensor | None = None, segments: dict[str, list[int]] | None = None
) -> Tokens:
    """The pieces of a text, from their ids (1, tokens); special are those that the tokenizer counts so, unless told."""
    numbers = ids[0].tolist()
    if special is None:
        special = torch.tensor([number in tokenizer.all_special_ids for number in numbers])
    names = tuple(str(name) for name in tokenizer.convert_ids_to_tokens(numbers))
    spelling = spelling_of(tokenizer)
    return Tokens(names, special.cpu(), words=True, ordered=True, spelling=spelling, segments=segments or {})


def tokenizer_of(processor: Any) -> Any:
    """What makes tokens of a text: the processor, or the part of it that does; None where there is none."""
    return processor if hasattr(processor, "convert_ids_to_tokens") else getattr(processor, "tokenizer", None)
