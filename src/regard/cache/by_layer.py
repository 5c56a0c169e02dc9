"""A factor of the budget for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.cache.budget import Uniform, ceil, number_of

if TYPE_CHECKING:
    from regard.cache.policy import Entries


@dataclass(frozen=True)
class ByLayer(Uniform):
    """A factor of the budget for each layer: ``factor_l · budget`` entries, rounded up, all tokens at most.

    Args:
        budget: entries of each head: a number of them, or a share of the tokens.
        factors: of each layer whose cache grows; those with a sliding window are left alone.

    Raises:
        ValueError: no number of entries and no share; a negative factor, or none; while the model runs, one that has
            another number of layers.

    >>> import regard
    >>> print(regard.cache.Knorm(budget=regard.cache.ByLayer(0.25, [1.5, 1.0, 0.5])))
    Knorm(budget=ByLayer(0.25, [1.5, 1.0, 0.5]))
    """

    factors: Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.factors
        if isinstance(given, str) or not isinstance(given, Sequence) or not given or not all(f >= 0 for f in given):
            raise ValueError(f"ByLayer: factors must be numbers of at least 0, one for each layer, got {given!r}")

    def of_layer(self, entries: Entries, least: int) -> Tensor:
        """(batch,): the layer's factor of the budget."""
        if len(self.factors) != entries.layers:
            raise ValueError(
                f"ByLayer: {len(self.factors)} factors were given, but the model has {entries.layers} layers"
            )
        return ceil(number_of(self.budget, entries.tokens) * float(self.factors[entries.layer]))
