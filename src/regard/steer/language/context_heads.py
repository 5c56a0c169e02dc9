"""Head steering toward the user's context, which a chat template takes attention from.

    P'_ij = P_ij / C_i        for the keys j of the user's context
    P'_ij = α P_ij / C_i      for the rest of the prompt: system prompt, template, sinks,   C_i the sum of row i

on chosen heads, or on all of them: the rule of `pasta`, with a mild α such as 0.9.

Y. Wang, A. Bai, N. Peng, C.-J. Hsieh (2024), On the Loss of Context-awareness in General Instruction Fine-tuning. What a
head gives to the context is the mean, over the queries of the response, of its attention to the context's tokens; the
heads that matter are those that give the most, and what the template costs them is the difference to the same text without.

Left out: the conditional fine-tuning with an indicator of context dependence, which is training and no edit of attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Module

from regard.steer.language._pasta import pasta
from regard.steer.language.example import Example, Progress, highlighted, next_logits
from regard.steer.language.heads import Head
from regard.steer.reweight import Reweight
from regard.tokens import Positions, resolve
from regard.watch import Mass, watch


def steer_to_context(
    context: Positions, tokens: int, alpha: float = 0.9, heads: Sequence[Head] | None = None
) -> Reweight:
    """The edit that has heads look at the user's context.

    Args:
        context: positions of the context's tokens, or a boolean mask (tokens,) or (batch, tokens).
        tokens: the prompt's length, template and all.
        alpha: what the attention to the rest of the prompt is multiplied by.
        heads: pairs (layer, head), such as the best by `context_share`; every head by default, as the authors have it.

    Raises:
        ValueError: a context that holds no token of the prompt, or all of them.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 4, 4)
    >>> with regard.steer(None, steer_to_context(slice(1, 3), tokens=4, alpha=0.5)):
    ...     attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.1667, 0.3333, 0.3333, 0.1667])
    """
    return pasta(context, tokens, alpha, heads)


def context_share(model: Module, examples: Sequence[Example], progress: Progress | None = None) -> dict[Head, float]:
    """What each head gives to the ``highlighted`` tokens, on the mean over the ``response`` tokens and over examples.

    ``best_heads(scores, top=k)`` chooses among the heads; a difference of two such shares is what a template costs.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with ``highlighted`` positions; their ``response`` is the last token by default.
        progress: called with the number of examples done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> shares = context_share(model, [Example([3, 4, 5, 6], highlighted=slice(0, 4))])
    >>> {head: round(share, 4) for head, share in shares.items()}
    {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 1.0}
    """
    if not examples:
        raise ValueError("no examples were given")
    sums: dict[Head, float] = {}
    for number, example in enumerate(examples):
        for head, share in _shares(model, example).items():
            sums[head] = sums.get(head, 0.0) + share
        if progress is not None:
            progress(number + 1, len(examples))
    return {head: total / len(examples) for head, total in sums.items()}


def _shares(model: Module, example: Example) -> dict[Head, float]:
    context = resolve(highlighted(example), 0, len(example))[0]
    queries = resolve(example.response, 0, len(example))[0]
    if not bool(context.any()) or not bool(queries.any()):
        raise ValueError(
            f"of an example with {len(example)} tokens, {int(context.sum())} are highlighted and {int(queries.sum())} are "
            "its response; both need some"
        )
    with torch.no_grad(), watch(model, Mass({"context": context})) as seen:
        next_logits(model, example.token_ids)
    mass = seen.dataset().mass.isel(batch=0, segment=0)
    of_heads = mass.isel(query=queries.nonzero().flatten().tolist()).mean("query", skipna=False).values
    return {
        (layer, head): float(share)
        for layer, row in enumerate(of_heads)
        for head, share in enumerate(row)
        if share == share  # a layer with fewer heads than another has NaN for the rest
    }
