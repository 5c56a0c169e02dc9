"""Pages that a step's query may look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from regard.cache.budget import check_budget, number_of
from regard.cache.controls import KeepAll
from regard.cache.rest import Rest
from regard.cache.unread import Unread

if TYPE_CHECKING:
    from regard.cache.kept_call import KeptCall
    from regard.cache.layer import KeptLayer


@dataclass(frozen=True, kw_only=True)
class Quest(KeepAll):
    """In each decoding step each query head reads the pages of the text in which a key may have the largest logit:

    ``bound_p = Σ_d max(q_d · min_{j in p} k_jd, q_d · max_{j in p} k_jd)``, of ``budget // page`` pages, and of 3 at least.

    Prompts, and steps of the first layers, read everything. Nothing leaves the memory; what is saved is the time to read it.

    Args:
        budget: tokens that a head reads: a number of them, or a share of the text.
        page: tokens of a page, counted from the first of the text.
        dense: how many first layers read everything, among those without a sliding window; the authors take 2.

    The last page counts as the others do. Query heads that share a key head choose for themselves.

    J. Tang et al. (2024), Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference.

    Raises:
        ValueError: no number of tokens and no share; a page of no token; while the model runs, a cache of which another
            policy dropped some.

    >>> import regard
    >>> print(regard.cache.Quest(budget=1024))
    Quest(budget=1024)
    """

    budget: int | float = field(default=1.0, kw_only=False)
    page: int = 16
    dense: int = 2

    def __post_init__(self) -> None:
        check_budget(self.budget, 1, "Quest")
        if self.page < 1 or self.dense < 0:
            raise ValueError(
                f"Quest: page must be at least 1 and dense at least 0, got page={self.page}, dense={self.dense}"
            )

    @property
    def rest(self) -> Rest:
        """Pages that a head does not read stay in memory."""
        return Unread()

    def step_call(self, layer: KeptLayer) -> type[KeptCall]:
        """One on pages, of a layer that is not dense."""
        from regard.cache.kept_call import KeptCall
        from regard.cache.paged_call import PagedCall

        return PagedCall if layer.rank >= self.dense else KeptCall

    def pages(self, tokens: Tensor) -> Tensor:
        """(batch,): how many pages of texts of so many tokens a head reads."""
        return (number_of(self.budget, tokens).minimum(tokens) // self.page).clamp(min=3)
