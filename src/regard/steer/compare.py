"""What a language model says, without edits of its attention and with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.models import parting, write
from regard.steer import Edit, capture, steer
from regard.steer._sweep import sweep
from regard.steer.metrics import logit_difference
from regard.steer.sweep_result import HeadChange
from regard.tokens import chat_text, encode, locate

_SHORT = 256


@dataclass(frozen=True)
class Said:
    """The likeliest next tokens with their probabilities, or all of them where they are few, and a completion."""

    probabilities: dict[str, float]
    completion: str


@dataclass(frozen=True)
class Comparison:
    """One text, read ``plain`` and ``steered`` by ``edits``.

    Both completions begin with what is ``shared``; the probabilities, which hold the likeliest tokens of either, are those of
    the token after it: the first that differs, or where none does the first of all. ``heads`` are those through which the
    edits did most, by what the logit of the steered token less that of the plain one becomes when that head alone puts out
    what it does in the steered run.
    """

    edits: tuple[Edit, ...]
    plain: Said
    steered: Said
    shared: str = ""
    heads: tuple[HeadChange, ...] = ()


def compare(
    model: Module,
    tokenizer: Any,
    text: str,
    edits: Sequence[Edit],
    *,
    likeliest: int = 5,
    complete: int = 0,
    heads: int | None = None,
    chat: bool = False,
    progress: Callable[[str, int], None] = lambda path, total: None,
) -> Comparison:
    """Read a text twice, plain and steered.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads; edits may name passages of it.
        edits: in their order.
        likeliest: how many next tokens to compare.
        complete: how many tokens to write, greedily.
        heads: how many heads to name; the model runs once for each that it has, on the text up to what differs. By default
            5 where the text has at most 256 tokens, and else none.
        chat: the text is a user's message, and is read in the tokenizer's chat template.
        progress: called for each head that was tried, as by `regard.sweep`.

    Raises:
        ValueError: an empty text; one longer than the model's positions; passages that do not occur once; ``chat`` with a
            tokenizer that has no template.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> text = "The code of Ada is 48213. The code of Tom is 70455. The code of Ada is"
    >>> edit = regard.Redistribute(source=" 48213", target=" 70455")
    >>> found = compare(model, tokenizer, text, [edit], complete=6, heads=1)
    >>> found.plain.completion, found.steered.completion, found.shared
    (' 48213', ' 70455', ' ')
    >>> found.heads[0].layer, found.heads[0].head
    ('model.layers.3.self_attn', 5)
    """
    text = chat_text(tokenizer, text) if chat else text
    (encoded,) = encode(model, tokenizer, text, room=complete, add_special_tokens=not chat)
    tokens = tokenizer(text, add_special_tokens=not chat, verbose=False)
    located = tuple(locate(edit, text, tokens) for edit in edits)
    plain = write(model, tokenizer, encoded.inputs, max(complete, 1))
    with steer(model, *located):
        steered = write(model, tokenizer, encoded.inputs, max(complete, 1))
    step = parting(plain.tokens, steered.tokens)
    at = step or 0
    shares = [written.logits[at].softmax(-1) for written in (plain, steered)]
    top = {int(token) for of_run in shares for token in of_run.topk(likeliest).indices}
    order = sorted(top, key=lambda token: -float(shares[0][token]))
    said = [
        Said({tokenizer.decode([token]): float(of_run[token]) for token in order}, written.text if complete else "")
        for of_run, written in zip(shares, (plain, steered), strict=True)
    ]
    strongest: tuple[HeadChange, ...] = ()
    heads = (5 if encoded.inputs["input_ids"].shape[1] <= _SHORT else 0) if heads is None else heads
    if heads and step is not None:
        strongest = _strongest(model, encoded.inputs, located, plain.tokens, steered.tokens, step, heads, progress)
    return Comparison(located, said[0], said[1], tokenizer.decode(plain.tokens[:at]), strongest)


def _strongest(
    model: Module,
    inputs: Mapping[str, Tensor],
    edits: Sequence[Edit],
    plain: list[int],
    steered: list[int],
    step: int,
    number: int,
    progress: Callable[[str, int], None],
) -> tuple[HeadChange, ...]:
    """The heads that bring the steered token nearest, each patched alone from the steered run into the plain one."""
    ids = inputs["input_ids"]
    read = torch.cat([ids, ids.new_tensor([plain[:step]])], dim=1)
    given = {"input_ids": read, "attention_mask": torch.ones_like(read), "use_cache": False}
    with torch.inference_mode(), steer(model, *edits), capture(model, outputs=True) as source:
        model(**given)
    metric = logit_difference(steered[step], plain[step])
    found = sweep(model, given, metric, kind="patch", source=source, progress=progress)
    return tuple(found.strongest(number))
