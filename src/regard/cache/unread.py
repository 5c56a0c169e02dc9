"""Entries that stay in memory, unread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from regard.cache.rest import Rest

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Entries


@dataclass(frozen=True)
class Unread(Rest):
    """Leave entries that are not kept in memory; calls do not read them until the policy chooses anew.

    An entry that is not read receives no attention: a policy that goes by that of a step's query brings none back, one that
    goes by keys, or by a window of queries, does.

    >>> import regard
    >>> print(regard.cache.Knorm(budget=0.25, when=regard.cache.Every(16), rest=regard.cache.Unread()))
    Knorm(budget=0.25, when=Every(16), rest=Unread())
    """

    frees: ClassVar[bool] = False

    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Have the layer read the others."""
        layer.choose(scores, counts)
