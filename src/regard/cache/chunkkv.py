"""Neighbouring tokens that stay or go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache._images import at_entries
from regard.cache.around import Around
from regard.cache.policy import Entries
from regard.cache.ranks import ranks


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Around):
    """Keep whole chunks of ``length`` tokens, those of the highest mean score of another policy: the same for all heads.

    ``score_c = Σ_h mean_{j in c} score^h_j``; as many chunks stay as the budget has room for, beside the entries that the
    other policy keeps in any case, such as its window.

    Args:
        policy: whose scores count, and whose budget holds; the mean of its heads where these share it unevenly.
        length: tokens of a chunk, counted from the first of the text. The last may have fewer.
        reuse: so many neighbouring layers keep what the first of them chooses (layer-wise index reuse); 1 for none.

    X. Liu et al. (2025), ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference.

    >>> import regard
    >>> print(regard.cache.ChunkKV(regard.cache.Knorm(budget=0.5), length=20).length)
    20
    """

    length: int = 10
    reuse: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ValueError(f"ChunkKV: length must be at least 1 token, got {self.length}")
        if self.reuse < 1:
            raise ValueError(f"ChunkKV: reuse must be at least 1 layer, got {self.reuse}")

    def score(self, entries: Entries) -> Tensor:
        """Scores of chunks; in a layer that reuses those of an earlier one, 0 for what stays there and −∞ for what goes."""
        if entries.layer % self.reuse:
            stay = at_entries(entries.memory[ChunkKV], entries)
            return stay.log()
        scores = self._of_chunks(entries)
        if self.reuse > 1:
            place = torch.where(scores > -torch.inf, entries.positions, entries.seen)  # what goes is cut off at the end
            kept = torch.zeros(len(place), entries.seen + 1, dtype=torch.bool, device=place.device)
            entries.memory[ChunkKV] = kept.scatter(1, place.flatten(1), True)[:, :-1]
        return scores

    def _of_chunks(self, entries: Entries) -> Tensor:
        """The score of the entry's chunk, −∞ for chunks that go, infinite for what the policy within always keeps."""
        scores = self.inner(entries)
        sure = scores == torch.inf
        free = entries.real & ~sure
        chunk = torch.where(free, entries.ranks // self.length, 0)
        of_chunk, number = _means(scores.masked_fill(~free, 0.0), free, chunk, entries.seen // self.length + 1)
        room = self.policy.counts(entries, scores).double().mean(dim=1) - sure.sum(dim=2).double().mean(dim=1)
        stay = (room / self.length + 1e-9).floor().clamp(min=0).long()
        nothing = ~sure.flatten(1).any(dim=1)
        stay = torch.where(nothing, stay.clamp(min=1), stay)
        everything = (room >= free.sum(dim=2).double().mean(dim=1) - 1e-9)[:, None]
        order = ranks(of_chunk.masked_fill(number == 0, -torch.inf), dim=1)
        kept = (order < stay[:, None]) | everything
        index = chunk.flatten(1)
        stays = kept.gather(1, index).view_as(chunk) & free
        best = of_chunk.gather(1, index).view_as(scores)
        return best.masked_fill(~stays, -torch.inf).masked_fill(sure, torch.inf)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """(batch, key heads): what is in the chunks that stay, and what the policy within always keeps."""
        return (scores > -torch.inf).sum(dim=2)


def _means(scores: Tensor, free: Tensor, chunk: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The mean score (B, chunks) of the entries of each chunk, summed over heads, and the number of its entries."""
    zeros = scores.new_zeros(*scores.shape[:2], chunks)
    total = zeros.scatter_add(2, chunk, scores)
    number = zeros.scatter_add(2, chunk, free.to(scores.dtype))
    return (total / number.clamp(min=1)).sum(dim=1), number.sum(dim=1)
