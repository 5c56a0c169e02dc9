"""What a policy keeps of a text, and what the model then writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Module

from regard.cache._compress import compress
from regard.cache._part import Part
from regard.cache.around import Around
from regard.cache.policy import Policy
from regard.cache.report import Report
from regard.models import complete as write
from regard.notation import parse
from regard.tokens import encode


@dataclass(frozen=True)
class Trial:
    """A text read with a compressed cache: its ``report``, and completions ``plain`` (full cache) and ``compressed``.

    ``tokens`` are the pieces of the text and ``shares`` tells of each by which share of the layers' heads it is kept.
    """

    report: Report
    tokens: list[str]
    shares: list[float]
    plain: str
    compressed: str


def read_policy(text: str, budget: int | float | None = None) -> Policy:
    """A policy as one writes it; a quarter of the cache, if nothing is said of its budget and it takes one.

    Raises:
        ValueError: an unknown policy, with the nearest known one; arguments that it does not take.

    >>> print(read_policy("snapkv(window=8)"))
    SnapKV(budget=0.25, window=8)
    >>> print(read_policy("ChunkKV(Knorm)", 64))
    ChunkKV(Knorm(budget=64))
    >>> print(read_policy("SnapKV(Adaptive(Pyramid(0.25)), when=Every(16), rest=Merge)"))
    SnapKV(budget=Adaptive(Pyramid(0.25)), when=Every(16), rest=Merge())
    """
    around = text.partition("(")[0].strip().lower() in {kind.__name__.lower() for kind in Around.__subclasses__()}
    given = {} if budget is None or around else {"budget": budget}
    policy: Any = parse(text, Policy, "policy", "SnapKV(window=16)", Part, **given)
    return _with_budget(policy, 0.25 if budget is None else budget)


def _with_budget(policy: Any, budget: int | float) -> Policy:
    """A policy, or the one that it goes around, with this budget if nothing is said of its own."""
    if isinstance(policy, Around):
        within: Any = _with_budget(policy.policy, budget)
        return replace(policy, policy=within)
    read: Policy = replace(policy, budget=budget) if getattr(policy, "budget", None) == 1.0 else policy
    return read


def trial(model: Module, tokenizer: Any, text: str, policy: Policy, complete: int = 20) -> Trial:
    """Read a text with a policy and write on from it, greedily, with the full cache and with the compressed one.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads.
        policy: such as ``regard.cache.SnapKV(budget=0.25)``.
        complete: how many tokens to write.

    Raises:
        ValueError: an empty text; one longer than the model's positions.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> text = "The code of Ada is 48213. They slept. The code of Ada is"
    >>> found = trial(model, tokenizer, text, regard.cache.StreamingLLM(budget=10), complete=6)
    >>> found.plain, found.compressed == found.plain
    (' 48213', False)
    """
    inputs = encode(model, tokenizer, text, room=complete)[0].inputs
    with torch.inference_mode(), compress(model, policy) as cache:
        model(**inputs)
    report = cache.report()
    with compress(model, policy):
        compressed = write(model, tokenizer, inputs, complete)
    plain = write(model, tokenizer, inputs, complete)
    kept = torch.cat([layer.positions[0].float() for layer in report.layers if not layer.window])
    return Trial(report, _pieces(tokenizer, text), kept.mean(dim=0).tolist(), plain, compressed)


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """The text cut at the end of each token."""
    ends = [stop for _, stop in tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    return [text[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
