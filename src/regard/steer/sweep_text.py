"""Which heads of a language model matter for what it says of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import Module

from regard.steer._sweep import Kind, sweep
from regard.steer.question import inputs_of, question, text_ids
from regard.steer.sweep_result import SweepResult
from regard.tokens import Heads, Layers, chat_text


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

    The metric is that of `question`.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads.
        answer: as for `question`.
        wrong: as for `question`.
        kind: as for `regard.sweep`.
        by: as for `regard.sweep`.
        source: another text for "mean" and "patch", for the latter with as many tokens.
        layers: as for `regard.sweep`.
        heads: as for `regard.sweep`.
        max_tokens: read so many tokens of the text and no more.
        chat: the text, and the other one, is a user's message, and is read in the tokenizer's chat template.
        progress: as for `regard.sweep`.

    Raises:
        ValueError: as `regard.sweep` and `question`.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> found = sweep_text(model, tokenizer, "The code of Ada is 48213. The code of Ada is", answer=" 48213", layers=3)
    >>> found.dataset.attrs["metric"]
    "log-probability of ' 48213'"
    """
    asked = question(model, tokenizer, text, answer=answer, wrong=wrong, max_tokens=max_tokens, chat=chat)
    other = None
    if source is not None:
        appended = 0 if kind == "mean" else asked.appended  # what was read of the answer, in both runs
        source = chat_text(tokenizer, source) if chat else source
        ids = text_ids(model, tokenizer, source, max_tokens, chat)
        other = inputs_of(model, tokenizer, ids + asked.read[len(asked.read) - appended :])
    found = sweep(
        model, asked.inputs, asked.metric, kind=kind, by=by, source=other, layers=layers, heads=heads, progress=progress
    )
    found.dataset.attrs["metric"] = asked.said
    return found
