"""What a policy keeps of a text, and what the model then writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache._compress import compress
from regard.cache._part import Part
from regard.cache.around import Around
from regard.cache.policy import Policy
from regard.cache.report import Report
from regard.models import parting, write
from regard.notation import parse
from regard.tokens import chat_text, encode
from regard.watch import Rows, watch


@dataclass(frozen=True)
class Trial:
    """A text read with a compressed cache: its ``report``, and completions ``plain`` (full cache) and ``compressed``.

    ``tokens`` are the pieces of the text and ``shares`` tells of each by which share of the layers' heads it is kept. Where
    the completions differ, ``shared`` is how both begin, and ``missed`` holds numbers of a layer and a head and the share of
    its attention that goes, with the full cache and after what is shared, to tokens that it dropped; the largest first.
    """

    report: Report
    tokens: list[str]
    shares: list[float]
    plain: str
    compressed: str
    shared: str = ""
    missed: tuple[tuple[int, int, float], ...] = ()


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


def trial(model: Module, tokenizer: Any, text: str, policy: Policy, complete: int = 20, *, chat: bool = False) -> Trial:
    """Read a text with a policy and write on from it, greedily, with the full cache and with the compressed one.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads.
        policy: such as ``regard.cache.SnapKV(budget=0.25)``.
        complete: how many tokens to write.
        chat: the text is a user's message, and is read in the tokenizer's chat template.

    Raises:
        ValueError: an empty text; one longer than the model's positions; ``chat`` with a tokenizer that has no template.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> text = "The code of Ada is 48213. They slept. The code of Ada is"
    >>> found = trial(model, tokenizer, text, regard.cache.StreamingLLM(budget=10), complete=6)
    >>> found.plain, found.shared, found.compressed == found.plain
    (' 48213', ' 4', False)
    >>> layer, head, share = found.missed[0]
    >>> layer, head, round(share, 2)
    (3, 5, 1.0)
    """
    text = chat_text(tokenizer, text) if chat else text
    inputs = encode(model, tokenizer, text, room=complete, add_special_tokens=not chat)[0].inputs
    with torch.inference_mode(), compress(model, policy) as cache:
        model(**inputs)
    report = cache.report()
    with compress(model, policy):
        compressed = write(model, tokenizer, inputs, complete)
    plain = write(model, tokenizer, inputs, complete)
    kept = torch.cat([layer.positions[0].float() for layer in report.layers if not layer.window])
    pieces = _pieces(tokenizer, text, add_special_tokens=not chat)
    step = parting(plain.tokens, compressed.tokens)
    shared = plain.tokens[: step or 0]
    missed = () if step is None else _missed(model, inputs["input_ids"], shared, report)
    shares = kept.mean(dim=0).tolist()
    return Trial(report, pieces, shares, plain.text, compressed.text, tokenizer.decode(shared), missed)


def _pieces(tokenizer: Any, text: str, add_special_tokens: bool) -> list[str]:
    """The text cut at the end of each token."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    ends = [stop for _, stop in encoded["offset_mapping"]]
    return [text[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def _missed(model: Module, ids: Tensor, written: list[int], report: Report) -> tuple[tuple[int, int, float], ...]:
    """Of each layer's number and head the share of its attention, after what was written, to what is dropped of the text."""
    read = torch.cat([ids, ids.new_tensor([written])], dim=1)
    with torch.inference_mode(), watch(model, Rows([read.shape[1] - 1])) as seen:
        model(read, use_cache=False)
    rows = torch.as_tensor(seen.dataset()["rows"].values)[:, 0, :, 0, : ids.shape[1]]  # (layers, heads, tokens)
    if len(rows) != len(report.layers):
        return ()  # a hybrid, some of whose layers have other caches
    found = []
    for layer, row in zip(report.layers, rows, strict=True):
        dropped = ~layer.positions[0].repeat_interleave(len(row) // layer.positions.shape[1], dim=0)
        if not layer.window:
            found += [(layer.layer, head, float(share)) for head, share in enumerate((row * dropped).sum(-1))]
    return tuple(sorted(found, key=lambda one: -one[2]))
