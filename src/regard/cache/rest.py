"""What becomes of the entries that a policy does not keep: unless it is told otherwise, they are dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from regard.cache._part import Part

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Entries


class Rest(Part, ABC):
    """What becomes of the entries that a policy does not keep."""

    frees: ClassVar[bool] = True
    """Whether they leave the memory, or take less of it."""

    reads: ClassVar[int] = 0
    """Of how many last queries it needs to know the attention, after a policy that reads none."""

    @abstractmethod
    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Have a layer keep the entries of the highest scores (B, Hk, L), as many as the counts (B, Hk) say.

        With ``in_order`` they are to stay in the order of the text.
        """


@dataclass(frozen=True)
class Drop(Rest):
    """Drop entries that are not kept: they leave the memory.

    >>> import regard
    >>> print(regard.cache.SnapKV(budget=0.25).rest)
    Drop()
    """

    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Keep the others, and nothing of these."""
        layer.keep(scores, counts, in_order)
