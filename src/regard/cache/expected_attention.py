"""What queries that are still to come can be expected to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.cache.budget_policy import BudgetPolicy
from regard.cache.module_call import ModuleCall
from regard.cache.policy import Entries, Reads


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(BudgetPolicy):
    """Keep the entries that the next ``future`` queries can be expected to take most from:

    ``score_j = mean_h softmax_j(scale·μ_h·k_j + scale²·k_jᵀ Σ_h k_j / 2) · ‖v_j‖``,

    queries being taken for normally distributed: μ and Σ are those of the text's queries so far without rotary positions,
    turned by the mean rotation of the positions to come.

    Args:
        budget, when, rest: as for every `BudgetPolicy`.
        sinks: first tokens, which are kept, and whose queries do not count.
        future: how many positions to come the rotation is the mean over.
        covariance: whether Σ counts; without it, the mean query alone.
        values: whether the norm of an entry's value counts.
        window: the last queries that μ and Σ are of while decoding; after a prompt or a turn, all of it.

    Raises:
        ValueError: a model whose rotary embedding is not found, or not of one axis.

    A. Devoto et al. (2025), Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution.

    >>> import regard
    >>> print(regard.cache.ExpectedAttention(budget=0.5))
    ExpectedAttention(budget=0.5)
    """

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    values: bool = True
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("sinks", 0), ("future", 1), ("window", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ExpectedAttention: {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def least(self) -> int:
        """The sinks, and an entry beside them."""
        return self.sinks + 1

    @property
    def reads(self) -> Reads:
        """The queries of the window, if it chooses while decoding."""
        return Reads(queries=self.window if self.when.while_decoding else 0)

    def score(self, entries: Entries) -> Tensor:
        """Expected attention, times the value's norm; sinks are kept."""
        mean, covariance = self._distribution(entries.module_call, entries.tokens)
        heads, factor = entries.keys.shape[1], entries.module_call.call.factor
        keys = entries.keys.to(mean.dtype)
        logits = factor * mean.unflatten(1, (heads, -1)) @ keys.mT  # (B, Hk, shared, entries)
        if covariance is not None:
            spread = covariance.unflatten(1, (heads, -1))
            logits = logits + factor**2 / 2 * ((keys[:, :, None] @ spread) * keys[:, :, None]).sum(dim=-1)
        sinks = entries.sinks(self.sinks)
        attention: Tensor = (
            logits.masked_fill((sinks | ~entries.real)[:, :, None], -torch.inf).softmax(dim=-1).mean(dim=2)
        )
        if self.values:
            attention = attention * torch.linalg.vector_norm(entries.values.to(mean.dtype), dim=-1)
        return attention.masked_fill(sinks, torch.inf)

    def _distribution(self, given: ModuleCall, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, Hq, D) and covariance (B, Hq, D, D) of queries to come."""
        ranks = given.query_ranks
        queries = given.queries.to(torch.promote_types(given.queries.dtype, torch.float32))
        counted = ranks >= self.sinks
        counted = torch.where(counted.any(dim=1, keepdim=True), counted, ranks >= 0)  # of a text of sinks, these
        turned = given.rotation(ranks.clamp(min=0))
        queries = queries if turned is None else turned.undo(queries)
        weight = (counted / counted.sum(dim=1, keepdim=True))[:, None, :, None].to(queries.dtype)
        mean = (queries * weight).sum(dim=2, keepdim=True)
        apart = queries - mean
        covariance = (apart * weight).mT @ apart if self.covariance else None
        to_come = tokens[:, None] + torch.arange(self.future, device=tokens.device)
        ahead = given.rotation(to_come)
        if ahead is None:
            return mean[:, :, 0], covariance
        ahead = ahead.mean()
        mean = ahead.turn(mean)[:, :, 0]
        return mean, None if covariance is None else ahead.turn(ahead.turn(covariance).mT).mT
