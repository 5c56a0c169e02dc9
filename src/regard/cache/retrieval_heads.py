"""Full caches for the heads that fetch what stands far back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache._compress import compress
from regard.cache.controls import KeepAll
from regard.cache.policy import Entries
from regard.cache.streaming_llm import StreamingLLM
from regard.watch import At, watch


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(StreamingLLM):
    """Retrieval heads keep all; the others keep ``sinks`` first tokens and the most recent ones.

    Args:
        heads: the key heads that keep all, by layer, as `profile` finds them. Layers are numbered among those that can be
            compressed: in a model with sliding windows, its other layers.
        budget: of each other head, sinks included, as for every `BudgetPolicy`.
        rest: as for every `BudgetPolicy`.
        sinks: first tokens to keep.
        when: at every step: each drops one token of each other head.

    Left out: a head's role learnt by gradient descent, and other heads that read no more of the prompt either (DuoAttention);
    a mean entry for those that were dropped (RazorAttention).

    G. Xiao et al. (2024), DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.
    H. Tang et al. (2024), RazorAttention: Efficient KV Cache Compression Through Retrieval Heads.

    >>> import regard
    >>> print(regard.cache.RetrievalHeads(budget=64, heads={1: [0], 2: [1, 3]}))
    RetrievalHeads(budget=64, heads={1: [0], 2: [1, 3]})
    """

    heads: Mapping[int, Sequence[int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.heads, Mapping):
            raise ValueError(
                "RetrievalHeads: heads must map layers to key heads, such as {1: [0], 2: [1, 3]} or what "
                f"RetrievalHeads.profile finds; got {self.heads!r}"
            )

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """All of retrieval heads, the budget of the others."""
        number = entries.keys.shape[1]
        chosen = list(self.heads.get(entries.layer, ()))
        layers = set(self.heads) - set(range(entries.layers))
        if layers or not all(0 <= head < number for head in chosen):
            where = f"layer {min(layers)}" if layers else f"heads {chosen} of layer {entries.layer}"
            raise ValueError(
                f"RetrievalHeads: heads has {where}, but {entries.layers} layers are compressed, numbered from 0, and this "
                f"one has {number} key heads"
            )
        full = torch.zeros(number, dtype=torch.bool, device=scores.device)
        full[chosen] = True
        others = self.of_heads(self.shares(entries)[:, None] * ~full, scores)
        return torch.where(full, entries.tokens[:, None], others)

    @staticmethod
    def profile(
        model: Module, samples: Sequence[Sequence[int] | Tensor], share: float = 0.25, by: str = "retrieval"
    ) -> dict[int, list[int]]:
        """Find the key heads of a model that look most at the token to be copied.

        The score of a query head is its mean attention to the target of ``regard.At(by)``, over all tokens of the samples
        that have one; that of a key head is the highest of the query heads that share it.

        Args:
            model: a decoder of transformers.
            samples: token ids of texts that repeat passages from far back, (tokens,) each.
            share: of the key heads of all compressed layers together, rounded up.
            by: "retrieval", the token to be copied where induction would tell another, or "induction", what followed
                the last occurrence of the same token: see `regard.At`.

        The retrieval heads of W. Wu et al. (2024), Retrieval Head Mechanistically Explains Long-Context Factuality, are
        counted by the tokens whose source the head looks at most; the mean attention tells more of few texts.

        >>> import regard
        >>> model, tokenizer = regard.mini()
        >>> text = "The code of Ada is 48213. They slept. The code of Ada is 48213."
        >>> heads = RetrievalHeads.profile(model, [tokenizer(text)["input_ids"]], share=0.1, by="induction")
        >>> print(RetrievalHeads(budget=0.25, heads=heads))
        RetrievalHeads(budget=0.25, heads={1: [1], 3: [2]})
        """
        if not 0 < share <= 1:
            raise ValueError(f"RetrievalHeads.profile: share must be above 0 and at most 1, got {share!r}")
        scores = _scores(model, samples, by)
        ranked = sorted(scores, key=lambda head: (-scores[head], head))
        chosen = sorted(ranked[: math.ceil(len(ranked) * share - 1e-9)])
        return {layer: [head for of, head in chosen if of == layer] for layer in sorted({of for of, _ in chosen})}


def _scores(model: Module, samples: Sequence[Sequence[int] | Tensor], by: str) -> dict[tuple[int, int], float]:
    """Of each key head, as (layer, head), layers numbered among those that can be compressed."""
    found = [_attention_to_targets(model, sample, by) for sample in samples]
    layers = [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]
    if not layers or not layers[0].shape[2]:
        raise ValueError(
            f'RetrievalHeads.profile: no token of {len(found)} samples has a target of At("{by}") in a layer that can be '
            "compressed; give texts that repeat passages"
        )
    best = [layer.mean(dim=2).amax(dim=1).tolist() for layer in layers]
    return {(layer, head): score for layer, heads in enumerate(best) for head, score in enumerate(heads)}


def _attention_to_targets(model: Module, sample: Sequence[int] | Tensor, by: str) -> list[Tensor]:
    """(key heads, query heads of each, tokens that have a target) of each layer that can be compressed."""
    with torch.no_grad(), compress(model, KeepAll()) as cache, watch(model, At(by)) as seen:
        ids = torch.as_tensor(sample, device=next(model.parameters()).device)
        if ids.ndim != 1 or ids.is_floating_point() or not len(ids):
            raise ValueError(f"a sample must be ids of shape (tokens,), got {ids.dtype} {tuple(ids.shape)}")
        model(input_ids=ids[None])
    of_layers = torch.as_tensor(seen.dataset()["at"].values)[:, 0, ..., 0]  # (layers, heads, queries)
    layers = zip(cache.report().layers, of_layers, strict=True)
    return [
        attention[:, ~attention[0].isnan()].unflatten(0, (len(layer.kept), -1))
        for layer, attention in layers
        if not layer.window
    ]
