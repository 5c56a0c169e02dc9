"""Which heads of a language model matter for what it says of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module

from regard.steer._sweep import Kind, sweep
from regard.steer.metrics import Metric, log_probability, logit_difference
from regard.steer.sweep_result import SweepResult
from regard.tokens import Heads, Layers, chat_text, encode
from regard.tokens.encoding import max_positions


def sweep_text(
    model: Module,
    tokenizer: Any,
    text: str,
    *,
    answer: str | None = None,
    wrong: str | None = None,
    kind: Kind = "zero",
    by: float | None = None,
    source: str | None = None,
    layers: Layers | None = None,
    heads: Heads | Mapping[Any, Heads] | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    progress: Callable[[str, int], None] = lambda path, total: None,
) -> SweepResult:
    """Sweep over the heads of a causal language model that reads a text.

    The metric is the logarithm of the answer's probability after the text; with a wrong answer too, the logit of the first
    token in which the answers differ, less that of the wrong one; without an answer, the log-likelihood of the text itself,
    per token.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads.
        answer: how the text may go on; it usually begins with a space.
        wrong: how else it may.
        kind: as for `regard.sweep`.
        by: as for `regard.sweep`.
        source: another text for "mean" and "patch", for the latter with as many tokens.
        layers: as for `regard.sweep`.
        heads: as for `regard.sweep`.
        max_tokens: read so many tokens of the text and no more.
        chat: the text, and the other one, is a user's message, and is read in the tokenizer's chat template.
        progress: as for `regard.sweep`.

    Raises:
        ValueError: as `regard.sweep`, `regard.tokens.chat_text` and `regard.tokens.encode`; a wrong answer that the right
            one begins with, or the other way round; an answer that changes how the end of the text is read.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> found = sweep_text(model, tokenizer, "The code of Ada is 48213. The code of Ada is", answer=" 48213", layers=3)
    >>> found.dataset.attrs["metric"]
    "log-probability of ' 48213'"
    """
    text = chat_text(tokenizer, text) if chat else text
    ids = _encoded(model, tokenizer, text, max_tokens, chat)
    right, other = (_continuation(tokenizer, text, ids, words, max_tokens, chat) for words in (answer, wrong))
    metric, read, said = _metric(tokenizer, ids, right, other, answer)
    given = _inputs(model, tokenizer, read)
    other_given = None
    if source is not None:
        further = [] if kind == "mean" else read[len(ids) :]  # what was read of the answer, in both runs
        source = chat_text(tokenizer, source) if chat else source
        other_given = _inputs(model, tokenizer, _encoded(model, tokenizer, source, max_tokens, chat) + further)
    found = sweep(
        model, given, metric, kind=kind, by=by, source=other_given, layers=layers, heads=heads, progress=progress
    )
    found.dataset.attrs["metric"] = said
    return found


def _encoded(model: Module, tokenizer: Any, text: str, max_tokens: int | None, chat: bool) -> list[int]:
    """The tokens of a text, without those that a tokenizer puts behind it."""
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


def _inputs(model: Any, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
    limit = max_positions(model, tokenizer)
    if len(ids) > limit:
        raise ValueError(f"text and answer have {len(ids):,} tokens, but the model has positions for {limit:,}")
    read = torch.tensor([ids], device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    return inputs | ({"use_cache": False} if getattr(model.config, "use_cache", False) else {})
