"""More entries for the first layers than for the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.cache.budget import Uniform, number_of

if TYPE_CHECKING:
    from regard.cache.policy import Entries


@dataclass(frozen=True)
class Pyramid(Uniform):
    """A ramp over the layers, from ``(2 − 1/β) b`` entries in the first to ``b/β`` in the last, and b in the mean.

    What the policy always keeps comes on top of these in every layer, and no layer keeps more than there is.

    Args:
        budget: entries of each head, in the mean over the layers: a number of them, or a share of the tokens.
        beta: β, how steep it is; the paper takes 20.

    Z. Cai et al. (2024), PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling.

    Raises:
        ValueError: no number of entries and no share; a beta below 1.

    >>> import regard
    >>> print(regard.cache.SnapKV(budget=regard.cache.Pyramid(0.25)))
    SnapKV(budget=Pyramid(0.25))
    """

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"Pyramid: beta must be at least 1, the same for all layers, got {self.beta!r}")

    def of_layer(self, entries: Entries, least: int) -> Tensor:
        """(batch,): the layer's place on the ramp."""
        layer, layers = entries.layer, entries.layers
        budget = number_of(self.budget, entries.tokens)
        if layers == 1:
            return budget
        further = budget - least
        most = (further * (2 - 1 / self.beta)).minimum(entries.tokens - least)  # all tokens at most
        upper = (most - 2 * (most - further) * min(layer, layers - 1 - layer) / (layers - 1)).round().long()
        # the first layer and the last have twice the mean together, so do the second and the last but one
        return least + (upper if 2 * layer < layers else 2 * further - upper)
