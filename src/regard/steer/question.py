"""A text and how it may go on, as a metric of what a language model says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from regard.steer.metrics import Metric, log_probability, logit_difference
from regard.tokens import chat_text, encode
from regard.tokens.encoding import max_positions


@dataclass(frozen=True)
class Question:
    """The arguments ``inputs`` that a model reads, the ``metric`` of its output, and what that is in words, ``said``.

    ``read`` are the tokens that are read, of which the last ``appended`` are of the answer: the metric is about the next one.
    """

    inputs: dict[str, Any]
    metric: Metric
    said: str
    read: list[int]
    appended: int


def question(
    model: Module,
    tokenizer: Any,
    text: str,
    *,
    answer: str | None = None,
    wrong: str | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
) -> Question:
    """Ask how a text goes on.

    The metric is the logarithm of the answer's probability after the text; with a wrong answer too, the logit of the first
    token in which the answers differ, less that of the wrong one; without an answer, the log-likelihood of the text itself,
    per token.

    Args:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
        text: what it reads.
        answer: how the text may go on; it usually begins with a space.
        wrong: how else it may.
        max_tokens: read so many tokens of the text and no more.
        chat: the text is a user's message, and is read in the tokenizer's chat template.

    Raises:
        ValueError: as `regard.tokens.chat_text` and `regard.tokens.encode`; a wrong answer that the right one begins with, or
            the other way round; an answer that changes how the end of the text is read.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> asked = question(model, tokenizer, "The code of Ada is 48213. The code of Ada is", answer=" 48213", wrong=" 70455")
    >>> asked.said, tokenizer.decode(asked.read[-1])
    ("logit of '4' less that of '7'", ' ')
    """
    text = chat_text(tokenizer, text) if chat else text
    ids = text_ids(model, tokenizer, text, max_tokens, chat)
    right, other = (_continuation(tokenizer, text, ids, words, max_tokens, chat) for words in (answer, wrong))
    metric, read, said = _metric(tokenizer, ids, right, other, answer)
    return Question(inputs_of(model, tokenizer, read), metric, said, read, len(read) - len(ids))


def text_ids(model: Module, tokenizer: Any, text: str, max_tokens: int | None, chat: bool) -> list[int]:
    """The tokens of a text, in its template if ``chat``, without those that a tokenizer puts behind it."""
    (encoded,) = encode(model, tokenizer, text, max_tokens=max_tokens, add_special_tokens=not chat)
    ids: list[int] = encoded.inputs["input_ids"][0].tolist()
    while bool(encoded.special[len(ids) - 1]):
        ids.pop()
    return ids


def _continuation(
    tokenizer: Any, text: str, ids: list[int], words: str | None, max_tokens: int | None, chat: bool
) -> list[int]:
    """The tokens that words add to a text."""
    if words is None:
        return []
    if max_tokens is not None:
        raise ValueError("an answer stands at the end of the text, which --max-tokens may cut off; give one of them")
    whole = tokenizer(text + words, add_special_tokens=not chat, verbose=False)["input_ids"]
    after = whole[len(ids) :]
    special = set(tokenizer.all_special_ids)
    while after and after[-1] in special:
        after.pop()
    if whole[: len(ids)] != ids or not after:
        raise ValueError(
            f"the answer {words!r} changes how the end of the text is read as tokens; begin the answer with the space, and "
            "leave it out at the end of the text"
        )
    return list(after)


def _metric(
    tokenizer: Any, ids: list[int], right: list[int], wrong: list[int], answer: str | None
) -> tuple[Metric, list[int], str]:
    """The metric, the tokens to be read for it, and what it is in words."""
    if wrong and not right:
        raise ValueError("a wrong answer is compared with the right one: give --answer too")
    if wrong:
        same = next((n for n, pair in enumerate(zip(right, wrong, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            raise ValueError("one of the answers begins with the other; they must differ in a token")
        first, second = right[same], wrong[same]
        words = [tokenizer.decode([token]) for token in (first, second)]
        return logit_difference(first, second), ids + right[:same], f"logit of {words[0]!r} less that of {words[1]!r}"
    if right:
        return log_probability(right), ids + right[:-1], f"log-probability of {answer!r}"
    if len(ids) < 2:
        raise ValueError("the text has one token, of which nothing foretells; give a longer one, or an answer")
    likelihood = log_probability(ids[1:], position=-2)
    return lambda output: likelihood(output) / (len(ids) - 1), ids, "log-likelihood of the text, per token"


def inputs_of(model: Any, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
    """The arguments of a model that reads these tokens, and keeps no cache of them.

    Raises:
        ValueError: more than the model has positions for.
    """
    limit = max_positions(model, tokenizer)
    if len(ids) > limit:
        raise ValueError(f"text and answer have {len(ids):,} tokens, but the model has positions for {limit:,}")
    read = torch.tensor([ids], device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    return inputs | ({"use_cache": False} if getattr(model.config, "use_cache", False) else {})
