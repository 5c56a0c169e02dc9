"""What goes stays in the values of those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from regard.cache.ranks import ranks
from regard.cache.rest import Rest

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Entries


@dataclass(frozen=True, kw_only=True)
class Merge(Rest):
    """Merge each entry that goes into the values of those after it that stay:

    ``v_k ← v_k + b_j v_j / n`` for the n entries k that follow j, ``b_j = 1`` with probability
    ``min(1, P_j / mean_k P_k)``, P being the attention that the policy reads, the mean over the query heads of a group; that
    of the last query where it reads none. So queries that attend as these did find, in the mean, what they would have found.

    Args:
        neighbours: n at most; fewer where fewer follow.
        prompt: whether what goes after a prompt is merged too, which the paper drops.
        seed: of b.

    After a prompt few entries take up the values of many, and what looks elsewhere than the last queries finds these in them:
    a language model writes worse for it, the worse the less stays (`bench.cache_real`). The authors drop then,
    ``prompt=False``. Their code draws b for the token after the one that goes; here it is the one that goes.

    Y. Zhang et al. (2024), CaM: Cache Merging for Memory-efficient LLMs Inference.

    Raises:
        ValueError: less than 1 neighbour.
        NotImplementedError: while the model runs, one that caches latents (DeepSeek's MLA), not values.

    >>> import regard
    >>> print(regard.cache.TOVA(budget=256, rest=regard.cache.Merge(neighbours=16)))
    TOVA(budget=256, rest=Merge(neighbours=16))
    """

    reads: ClassVar[int] = 1

    neighbours: int = 32
    prompt: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ValueError(f"Merge: neighbours must be at least 1, got {self.neighbours}")

    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Change the values of the entries that stay, and drop the others."""
        if layer.is_latent:
            raise NotImplementedError("Merge adds to values, which a model that caches latents of them does not keep")
        if self.prompt or entries.new == 1:
            layer.change_values(self.merged(entries, (ranks(scores) < counts[..., None]) & entries.real))
        layer.keep(scores, counts, in_order=True)

    def merged(self, entries: Entries, stays: Tensor) -> Tensor:
        """The values (B, Hk, L, D), with those of entries that go in their neighbours'."""
        goes = entries.real & ~stays
        received = entries.received if entries.received.ndim == 3 else entries.received.mean(dim=3)
        after = stays.long().cumsum(dim=2)  # how many stay up to an entry: the place of the next among these
        last = (after + self.neighbours).minimum(after[..., -1:])
        number = (last - after).clamp(min=1)
        attention = received.masked_fill(~stays, 0.0)
        places = after.new_zeros(*after.shape[:2], after.shape[2] + 1)
        sums = places.to(attention.dtype).scatter_add(2, torch.where(stays, after, 0), attention).cumsum(dim=2)
        mean = (sums.gather(2, last) - sums.gather(2, after)) / number
        chance = (received / mean).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1)
        generator = torch.Generator().manual_seed(hash((self.seed, entries.layer, entries.seen)))
        drawn = torch.rand(chance.shape, generator=generator).to(chance.device) < chance
        share = torch.where(goes & drawn & (last > after), 1.0 / number, 0.0)[..., None] * entries.values.float()
        width = share.shape[3]
        total = share.new_zeros(*share.shape[:2], share.shape[2] + 1, width)
        total.scatter_add_(2, after[..., None].expand_as(share), share)
        total.scatter_add_(2, last[..., None].expand_as(share), -share)
        added = total.cumsum(dim=2).gather(2, (after - 1).clamp(min=0)[..., None].expand_as(share))
        return torch.where(stays[..., None], entries.values.float() + added, entries.values).to(entries.values.dtype)
