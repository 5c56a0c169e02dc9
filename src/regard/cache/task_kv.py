"""Heads that stand out from their layer keep everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.policy import Entries, Reads
from regard.cache.ranks import ranks


@dataclass(frozen=True, kw_only=True)
class TaskKV(BudgetPolicy):
    """Heterogeneous heads keep all; the others keep sinks, recent tokens and, of the rest, what is attended to most.

    What a head has to say is ``v = Σ_{j in I} C_j v_j``, C being the attention that its entries receive from the last
    ``window`` queries and I the ``strongest`` of them. In a layer with n heads, of which f are heterogeneous, these are
    the f − 1 whose v is farthest (Euclidean) from the mean over the heads, and the nearest one; f falls evenly from the
    first layer to the last. Each other head keeps ``(n · budget − f · tokens) / (n − f)`` entries, rounded down: its sinks,
    its recent tokens, and the middle ones of the highest C, averaged over ``kernel`` neighbours.

    Args:
        budget, when, rest: as for every `BudgetPolicy`. The budget is the mean over a layer's heads, and comes
            first: where f full heads would leave the others less than their sinks and recent tokens, as many are
            heterogeneous as leave them these, which the report shows; a budget below sinks and recent tokens is refused. With
            `Adaptive` the others share by score what f heads leave them.
        sinks: first tokens that all heads keep.
        recent: last tokens that all heads keep.
        window: the last queries, whose attention is read.
        kernel: the width of the average, odd; 1 for none.
        strongest: entries that v is summed over.
        heterogeneous: shares of a layer's heads, in the first and the last layer, rounded to the nearest number. The
            default is the paper's for Llama 2 (7B), where 4 of 32 heads are heterogeneous in the last layer.

    Heads are key heads, with the mean attention of the query heads that share them; the paper does not say. Nor does it
    print the distance, or whether the nearest head is one of the f, which it is here, as the paper's formula for the
    others holds the budget only then. A single heterogeneous head is the farthest, and of two key heads, which are
    equally far, the first.

    X. He et al. (2025), Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads.

    >>> import regard
    >>> print(regard.cache.TaskKV(budget=0.5, recent=64))
    TaskKV(budget=0.5, recent=64)
    """

    pools: ClassVar[bool] = True

    sinks: int = 16
    recent: int = 256
    window: int = 32
    kernel: int = 7
    strongest: int = 256
    heterogeneous: tuple[float, float] = (0.25, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sinks", 0), ("recent", 1), ("window", 1), ("strongest", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"TaskKV: {name} must be at least {least}, got {getattr(self, name)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"TaskKV: kernel must be odd and at least 1, got {self.kernel}")
        if len(self.heterogeneous) != 2 or not all(0 <= share <= 1 for share in self.heterogeneous):
            raise ValueError(
                "TaskKV: heterogeneous must be two shares of the heads from 0 to 1, of the first layer and of the last, "
                f"got {self.heterogeneous!r}"
            )

    @property
    def least(self) -> int:
        """Sinks and recent tokens, which all heads keep."""
        return self.sinks + self.recent

    @property
    def reads(self) -> Reads:
        """The attention of the window."""
        return Reads(self.window)

    def score(self, entries: Entries) -> Tensor:
        """Received attention, averaged over neighbours in the middle; sinks and recent tokens are kept."""
        kept = entries.sinks(self.sinks) | entries.recent(self.recent)
        received = entries.received.masked_fill(kept | ~entries.real, 0.0)
        pooled = functional.avg_pool1d(received, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.masked_fill(kept, torch.inf)

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """All of heterogeneous heads, and what these leave of the budget for the others."""
        heads, tokens, share = entries.keys.shape[1], entries.tokens, self.shares(entries)
        full = self._number(entries, share)
        rest = (heads * share - full * tokens) // (heads - full).clamp(min=1)
        heterogeneous = self._are_heterogeneous(entries, full)
        return torch.where(heterogeneous, tokens[:, None], self.of_heads(rest[:, None] * ~heterogeneous, scores))

    def _number(self, entries: Entries, share: Tensor) -> Tensor:
        """(batch,): how many heads are heterogeneous."""
        heads, tokens = entries.keys.shape[1], entries.tokens
        first, last = self.heterogeneous
        depth = entries.layer / max(entries.layers - 1, 1)
        wanted = int(heads * (first + (last - first) * depth) + 0.5)
        spare, cost = heads * (share - self.least), tokens - self.least  # a full head costs so much more than another
        fitting: Tensor = torch.where(cost > 0, spare // cost.clamp(min=1), heads)
        return fitting.clamp(max=wanted)

    def _are_heterogeneous(self, entries: Entries, number: Tensor) -> Tensor:
        """(batch, key heads): so many heads of each text, the farthest ones and the nearest."""
        vectors = self._vectors(entries)
        offsets = (vectors[:, :, None] - vectors[:, None]).mean(dim=2)  # from the mean; of two heads exactly opposite
        distance: Tensor = torch.linalg.vector_norm(offsets, dim=-1)
        rank = ranks(distance, dim=1)
        number = number[:, None]
        farthest = torch.where(number > 1, number - 1, number)
        return (rank < farthest) | ((rank == rank.shape[1] - 1) & (number > 1))

    def _vectors(self, entries: Entries) -> Tensor:
        """(batch, key heads, width). Attention is summed over the queries: divided by their number it ranks the same."""
        attention, index = entries.received.topk(min(self.strongest, entries.received.shape[2]), dim=-1)
        values = entries.values.gather(2, index[..., None].expand(-1, -1, -1, entries.values.shape[3]))
        vectors: Tensor = (attention[..., None] * values).sum(dim=2)
        return vectors
