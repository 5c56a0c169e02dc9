"""What leaves the window stays in the values of those that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.cache.policy import Entries
from regard.cache.streaming_llm import StreamingLLM


@dataclass(frozen=True, kw_only=True)
class CaM(StreamingLLM):
    """First and last tokens, as of `StreamingLLM`; while decoding, one that goes is merged into the values of those after it:

    ``v_k ← v_k + b_j v_j / n`` for the n entries k that follow j, ``b_j = 1`` with probability
    ``min(1, P_last,j / mean_k P_last,k)``, P being the attention of the last query, the mean over the query heads of a group.

    Args:
        budget, prefill, by_layer, sinks: as for `StreamingLLM`.
        neighbours: n at most; fewer where fewer follow.
        seed: of b.
        every: 1, as in the paper: each step drops and merges one token.

    The authors' code draws b for the token after the one that goes; here it is the one that goes. What a prompt drops is
    not merged, as there.

    Y. Zhang et al. (2024), CaM: Cache Merging for Memory-efficient LLMs Inference.

    >>> import regard
    >>> print(regard.cache.CaM(budget=256, neighbours=16))
    CaM(budget=256, neighbours=16)
    """

    pools: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    neighbours: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise ValueError(f"CaM: neighbours must be at least 1, got {self.neighbours}")

    @property
    def reads(self) -> int:
        """The last query."""
        return 1

    def merged(self, entries: Entries, stays: Tensor) -> Tensor | None:
        """The values, with those of entries that go in their neighbours'."""
        if entries.new > 1:
            return None
        if entries.module_call.is_latent:
            raise NotImplementedError("CaM merges values, which a model that caches latents of them does not keep")
        goes = entries.real & ~stays
        after = stays.long().cumsum(dim=2)  # how many stay up to an entry: the place of the next among these
        last = (after + self.neighbours).minimum(after[..., -1:])
        number = (last - after).clamp(min=1)
        attention = entries.received.masked_fill(~stays, 0.0)
        places = after.new_zeros(*after.shape[:2], after.shape[2] + 1)
        sums = places.to(attention.dtype).scatter_add(2, torch.where(stays, after, 0), attention).cumsum(dim=2)
        mean = (sums.gather(2, last) - sums.gather(2, after)) / number
        chance = (entries.received / mean).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1)
        generator = torch.Generator().manual_seed(hash((self.seed, entries.layer, entries.seen)))
        drawn = torch.rand(chance.shape, generator=generator).to(chance.device) < chance
        share = torch.where(goes & drawn & (last > after), 1.0 / number, 0.0)[..., None] * entries.values.float()
        width = share.shape[3]
        total = share.new_zeros(*share.shape[:2], share.shape[2] + 1, width)
        total.scatter_add_(2, after[..., None].expand_as(share), share)
        total.scatter_add_(2, last[..., None].expand_as(share), -share)
        added = total.cumsum(dim=2).gather(2, (after - 1).clamp(min=0)[..., None].expand_as(share))
        return torch.where(stays[..., None], entries.values.float() + added, entries.values).to(entries.values.dtype)
