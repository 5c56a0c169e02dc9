"""What a language model says, without edits of its attention and with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn import Module

from regard.models import complete as write
from regard.steer import Edit, steer
from regard.tokens import encode, locate


@dataclass(frozen=True)
class Said:
    """The likeliest next tokens with their probabilities, or all of them where they are few, and a completion."""

    probabilities: dict[str, float]
    completion: str


@dataclass(frozen=True)
class Comparison:
    """One text, read ``plain`` and ``steered`` by ``edits``; both hold the likeliest next tokens of either."""

    edits: tuple[Edit, ...]
    plain: Said
    steered: Said

    @property
    def shared(self) -> str:
        """How both completions begin."""
        pairs = zip(self.plain.completion, self.steered.completion, strict=False)
        return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def compare(
    model: Module, tokenizer: Any, text: str, edits: Sequence[Edit], *, likeliest: int = 5, complete: int = 0
) -> Comparison:
    """Read a text twice, plain and steered.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads; edits may name passages of it.
        edits: in their order.
        likeliest: how many next tokens to compare.
        complete: how many tokens to write, greedily.

    Raises:
        ValueError: an empty text; one longer than the model's positions; passages that do not occur once.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> text = "The code of Ada is 48213. The code of Tom is 70455. The code of Ada is"
    >>> found = compare(model, tokenizer, text, [regard.Block(keys=" 48213")], complete=6)
    >>> found.plain.completion
    ' 48213'
    """
    located = tuple(locate(edit, text, tokenizer) for edit in edits)
    inputs = encode(model, tokenizer, text, room=complete)[0].inputs
    plain, steered = (_read(model, tokenizer, inputs, block, complete) for block in ((), located))
    tokens = {int(token) for scores, _ in (plain, steered) for token in scores.topk(likeliest).indices}
    order = sorted(tokens, key=lambda token: -float(plain[0][token]))
    said = [
        Said({tokenizer.decode([token]): float(scores[token]) for token in order}, completion)
        for scores, completion in (plain, steered)
    ]
    return Comparison(located, *said)


def _read(
    model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], edits: Sequence[Edit], complete: int
) -> tuple[torch.Tensor, str]:
    """The distribution of the next token, and what is written."""
    block: Callable[[], Any] = (lambda: steer(model, *edits)) if edits else ExitStack
    with torch.inference_mode(), block():
        scores = model(**inputs).logits[0, -1].float().softmax(-1).cpu()
    if not complete:
        return scores, ""
    with block():
        return scores, write(model, tokenizer, inputs, complete)
