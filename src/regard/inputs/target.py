"""A source and a target for models with an encoder and a decoder: three kinds of attention in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.inputs.reading import FoundCall, Part, Reading, Tokens, find_calls
from regard.inputs.text import read_text, text_tokens
from regard.tokens import encode, max_positions

ENCODER = "Encoder self-attention"
WRITTEN = 64
"""Without a target the model writes so many tokens at most."""


def read_translation(
    model: Any, tokenizer: Any, text: str, target: str | None = None, max_tokens: int | None = None
) -> Reading:
    """A source and a target, as translators and summarizers read them while they are trained.

    Args:
        model: an encoder–decoder of transformers that writes, such as T5, BART or Marian.
        tokenizer: its fast tokenizer.
        text: the source.
        target: what the decoder reads; by default what the model writes itself, greedily, of at most 64 tokens.
        max_tokens: read so many tokens of the source and no more.

    Raises:
        ValueError: as `regard.tokens.encode`, of either text.
    """
    if target is None and not model.can_generate():
        (reading,) = read_text(model.get_encoder(), tokenizer, text, max_tokens=max_tokens)
        note = "no --target was given, and the model has no head to write one: the encoder alone is shown"
        return replace(reading, parts=tuple(replace(part, name=ENCODER) for part in reading.parts), notes=(note,))
    encoded = encode(model, tokenizer, text, max_tokens=max_tokens)[0]
    source = text_tokens(tokenizer, encoded.inputs["input_ids"], encoded.special)
    return read_with_target(model, tokenizer, encoded.inputs, lambda _: source, target)


def read_with_target(
    model: Module, tokenizer: Any, inputs: Mapping[str, Tensor], source_of: Callable[[int], Tokens], target: str | None
) -> Reading:
    """An encoder's inputs, named, and a target: encoder, decoder and cross-attention, told from each other by their sizes.

    Args:
        model: an encoder–decoder of transformers.
        tokenizer: of the target.
        inputs: of the encoder.
        source_of: what the encoder's tokens are called, from how many there are.
        target: what the decoder reads; None for what the model writes.

    Raises:
        ValueError: a target without a token, or longer than the decoder's positions.
    """
    ids, notes = _decoder_ids(model, tokenizer, inputs, target)
    calls, short = _calls(model, inputs, ids)
    source, tokens = source_of(calls[0].keys), text_tokens(tokenizer, ids)
    sizes = {
        (len(source), len(source)): Part(ENCODER, source, source),
        (short, short): Part("Decoder self-attention", tokens, tokens),
        (short, len(source)): Part("Cross-attention", tokens, source),
    }
    paths = {size: tuple(call.path for call in calls if (call.queries, call.keys) == size) for size in sizes}
    parts = tuple(replace(part, layers=paths[size]) for size, part in sizes.items() if paths[size])
    return Reading(model, {**inputs, "decoder_input_ids": ids}, parts, calls, (*notes, *_left_out(calls, parts)))


def _calls(model: Module, inputs: Mapping[str, Tensor], ids: Tensor) -> tuple[tuple[FoundCall, ...], int]:
    """The calls over a short target, and its length, by which none of the decoder's can be taken for the encoder's."""
    short = ids[:, :1]
    calls = find_calls(model, {**inputs, "decoder_input_ids": short})
    if calls[0].keys == 1:  # the encoder runs first
        short = short.repeat(1, 2)
        calls = find_calls(model, {**inputs, "decoder_input_ids": short})
    return calls, short.shape[1]


def _left_out(calls: tuple[FoundCall, ...], parts: tuple[Part, ...]) -> list[str]:
    others = len(calls) - sum(len(part.layers or ()) for part in parts)
    return [f"not shown: {others} attention calls that are between neither of the two texts' tokens"] if others else []


def _decoder_ids(
    model: Any, tokenizer: Any, inputs: Mapping[str, Tensor], target: str | None
) -> tuple[Tensor, tuple[str, ...]]:
    """What the decoder reads, (1, tokens): it begins with its start token, and nothing comes after the last one."""
    if target is None:
        most = min(WRITTEN, _max_target_positions(model, tokenizer) // 2)
        options = {"max_new_tokens": most, "do_sample": False, "num_beams": 1}
        if (
            "force_unique_generate_call" in signature(model.generate).parameters
        ):  # else Whisper leaves out how it begins
            options["force_unique_generate_call"] = True
        with torch.inference_mode():
            written = model.generate(**inputs, **options)
        said = tokenizer.decode(written[0], skip_special_tokens=True)
        note = f"no --target was given: the decoder reads what the model itself writes, {said!r}"
        return _without_end(model, written.clone()), (note,)
    if not target.strip():
        raise ValueError("the target is empty")
    ids = tokenizer(text_target=target, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    start = min(_token_ids_of(model, "decoder_start_token_id"))
    ids = ids if ids[0, 0] == start else torch.cat([ids.new_full((1, 1), start), ids], dim=1)
    ids = _without_end(model, ids)
    limit = _max_target_positions(model, tokenizer)
    if ids.shape[1] > limit:
        raise ValueError(f"the target has {ids.shape[1]:,} tokens, but the decoder has positions for {limit:,}")
    return ids, ()


def _without_end(model: Any, ids: Tensor) -> Tensor:
    """Less the end that a text is given: it is what the token before it is to say, and is not read."""
    return ids[:, :-1] if ids.shape[1] > 1 and int(ids[0, -1]) in _token_ids_of(model, "eos_token_id") else ids


def _token_ids_of(model: Any, name: str) -> set[int]:
    """The ids that a model's settings have by a name; those of ``generate`` come first.

    Raises:
        ValueError: there are none.
    """
    for holder in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        found = getattr(holder, name, None)
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    raise ValueError(
        f"the configuration of {type(model).__name__} has no {name}, so that its decoder cannot be given a target"
    )


def _max_target_positions(model: Any, tokenizer: Any) -> int:
    return int(getattr(model.config, "max_target_positions", None) or max_positions(model, tokenizer))
