"""Keys along the direction of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache._compress import compress
from regard.cache.budget_policy import BudgetPolicy
from regard.cache.controls import KeepAll
from regard.cache.policy import Entries
from regard.cache.when import AfterPrompt, When


@dataclass(frozen=True, kw_only=True, eq=False)
class QFilters(BudgetPolicy):
    """Keep the keys that lie farthest along the direction in which queries lie, one for each key head: ``score_j = −f·k_j``.

    Reads no attention, and so costs next to nothing.

    Args:
        filters: f, (layers, key heads, width): as published for a model, or as `calibrate` finds them. Layers are numbered
            among those that can be compressed: in a model with sliding windows, its other layers.
        budget, when, rest: as for every `BudgetPolicy`.

    N. Godey et al. (2025), Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> text = tokenizer("The code of Ada is 48213. They slept. The code of Ada is")["input_ids"]
    >>> filters = regard.cache.QFilters.calibrate(model, [text])
    >>> filters.shape
    torch.Size([4, 4, 32])
    >>> with regard.compress(model, regard.cache.QFilters(budget=0.5, filters=filters)) as cache:
    ...     _ = model(torch.tensor([text]))
    >>> cache.report().kept
    0.5
    """

    filters: Tensor = field()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.filters, Tensor) or self.filters.ndim != 3:
            given = tuple(self.filters.shape) if isinstance(self.filters, Tensor) else type(self.filters).__name__
            raise ValueError(
                "QFilters: filters must be a tensor (layers, key heads, width), as QFilters.calibrate finds it; got "
                f"{given}"
            )

    def score(self, entries: Entries) -> Tensor:
        """Minus the product of the filter and the key."""
        wanted = (entries.layers, entries.keys.shape[1], entries.keys.shape[3])
        if tuple(self.filters.shape) != wanted:
            raise ValueError(
                f"QFilters: filters are {tuple(self.filters.shape)}, but the model has {wanted} compressed layers, key heads "
                "and numbers in a key: find its own with QFilters.calibrate"
            )
        of_layer = self.filters[entries.layer].to(entries.keys.device, torch.float32)
        product: Tensor = (entries.keys.float() @ of_layer[..., None])[..., 0]
        return -product

    @staticmethod
    def calibrate(
        model: Module, samples: Sequence[Sequence[int] | Tensor], queries: int = 3000, seed: int = 0
    ) -> Tensor:
        """The filters (layers, key heads, width) of a model, from texts that it reads.

        Of each query head the first right-singular vector of its queries, turned away from the most of them, and the mean
        over the heads of a group. The authors take 20 texts of 2,048 tokens.

        Args:
            model: a decoder of transformers.
            samples: token ids of texts, (tokens,) each, of two tokens at least.
            queries: how many of each head's queries count, at random.
            seed: of the choice.
        """
        collecting = _Collecting()
        device = next(model.parameters()).device
        for sample in samples:
            with torch.no_grad(), compress(model, collecting):
                model(input_ids=torch.as_tensor(sample, device=device)[None])
        if not collecting.found:
            raise ValueError("QFilters.calibrate needs texts of two tokens at least")
        generator = torch.Generator().manual_seed(seed)
        filters = []
        for layer in sorted(collecting.found):
            every = torch.cat([query for query, _ in collecting.found[layer]], dim=1)
            chosen = every[:, torch.randperm(every.shape[1], generator=generator)[:queries].to(every.device)]
            filters.append(_away(chosen).unflatten(0, (collecting.found[layer][0][1], -1)).mean(dim=1))
        return torch.stack(filters)


@dataclass(frozen=True, kw_only=True)
class _Collecting(KeepAll):
    """Drops nothing, and collects queries (query heads, tokens, width) and the number of key heads by layer."""

    found: dict[int, list[tuple[Tensor, int]]] = field(default_factory=dict)

    @property
    def when(self) -> When:
        """After a prompt."""
        return AfterPrompt()

    def score(self, entries: Entries) -> Tensor:
        """All alike."""
        queries = entries.module_call.queries[0].float()
        self.found.setdefault(entries.layer, []).append((queries, entries.keys.shape[1]))
        return super().score(entries)


def _away(queries: Tensor) -> Tensor:
    """(heads, width): the main direction of queries (heads, n, width), such that most of them lie against it."""
    direction = torch.linalg.svd(queries, full_matrices=False).Vh[:, 0]
    along = (queries @ direction[..., None] > 0).float().mean(dim=(1, 2))
    away: Tensor = -torch.where(along > 0.5, 1.0, -1.0)[:, None] * direction
    return away
