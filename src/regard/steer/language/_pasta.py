"""PASTA: emphasize a part of the prompt, on the heads for which that helps.

    P'_ij = P_ij / C_i        for the keys j of the highlighted spans
    P'_ij = α P_ij / C_i      for the other keys j of the prompt,   C_i the sum of row i, α = 0.01

on chosen heads: a `regard.Reweight` of the complement. Tokens that ``generate`` adds keep their weight.

Q. Zhang, C. Singh, L. Liu, X. Liu, B. Yu, J. Gao, T. Zhao (2023), Tell Your Model Where to Attend: Post-hoc Attention
Steering for LLMs. Heads are profiled as there: each is steered alone, heads are ranked by what the model then achieves on a
task, and those among the best k of every task are kept.

Several spans are one highlighted set, as in the paper's formula. Left out: the authors' code multiplies α once for every span
that a key is not in, so that two spans take α from each other; and its option "include" to multiply the highlighted keys
instead: that is ``Reweight(keys=spans, by=…)`` in the prompt, and another thing once tokens are generated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Module

from regard.steer.language.example import Example, Measure, Progress, accuracy, highlighted
from regard.steer.language.heads import Head, every_head, only, score_each
from regard.steer.reweight import Reweight
from regard.tokens import Positions, resolve


def pasta(spans: Positions, tokens: int, alpha: float = 0.01, heads: Sequence[Head] | None = None) -> Reweight:
    """The edit that emphasizes spans of a prompt.

    Args:
        spans: positions of the highlighted tokens, or a boolean mask (tokens,) or (batch, tokens).
        tokens: the prompt's length.
        alpha: what the attention to the rest of the prompt is multiplied by.
        heads: pairs (layer, head), as `best_heads` finds them; every head by default.

    Raises:
        ValueError: spans that hold no token of the prompt, or all of them.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 4, 4)
    >>> with regard.steer(None, pasta(slice(2, 4), tokens=4, alpha=0.25)):
    ...     attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.1000, 0.1000, 0.4000, 0.4000])
    """
    return Reweight(keys=_rest_of_prompt(spans, tokens), by=alpha, **only(heads))


def score_pasta_heads(
    model: Module,
    examples: Sequence[Example],
    alpha: float = 0.01,
    measure: Measure = accuracy,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> dict[Head, float]:
    """What a model achieves on one task with each head steered alone; ``best_heads(*scores, top=k)`` chooses among them.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with an answer and ``highlighted`` positions; the paper takes 1000.
        alpha: as for `pasta`.
        measure: of the logits of the next token; its mean is the head's score.
        heads: those to try; all by default.
        progress: called with the number of heads done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> scores = score_pasta_heads(model, [Example([3, 4, 5, 6], answer=7, highlighted=[1])])
    >>> list(scores)
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    if not examples:
        raise ValueError("no examples were given")
    heads = every_head(model, examples[0].token_ids) if heads is None else heads
    return score_each(
        model,
        examples,
        measure,
        lambda head: lambda batch: (pasta(_highlighted(batch), len(batch[0]), alpha, [head]),),
        heads,
        progress,
    )


def _highlighted(batch: Sequence[Example]) -> Tensor:
    """(batch, tokens) boolean."""
    return torch.cat([resolve(highlighted(example), 0, len(example)) for example in batch])


def _rest_of_prompt(spans: Positions, tokens: int) -> Tensor:
    chosen = resolve(spans, 0, tokens)
    chosen = chosen if len(chosen) > 1 else chosen[0]
    every = chosen.all(-1)
    if bool((every | ~chosen.any(-1)).any()):
        which = "all" if bool(every.any()) else "none"
        raise ValueError(
            f"pasta needs spans that hold a part of the prompt; {spans!r} hold {which} of its {tokens} tokens"
        )
    return ~chosen
