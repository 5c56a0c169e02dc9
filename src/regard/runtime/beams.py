"""How beam search puts the texts of a cache in another order between passes."""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

_orders: WeakKeyDictionary[object, tuple[int, Tensor]] = WeakKeyDictionary()
_count = itertools.count(1)


def install() -> None:
    """Have caches of transformers tell of their reordering, from now on."""
    module = sys.modules.get("transformers.cache_utils")
    for name in ("Cache", "EncoderDecoderCache"):
        kind = getattr(module, name, None)
        if kind is not None and "reorder_cache" in vars(kind) and not hasattr(kind.reorder_cache, "__wrapped__"):
            kind.reorder_cache = _told(kind.reorder_cache)


def _told(reorder: Any) -> Any:
    @functools.wraps(reorder)
    def reorder_cache(self: Any, beam_idx: Tensor) -> Any:
        _orders[self] = next(_count), beam_idx
        return reorder(self, beam_idx)

    return reorder_cache


def last_order(cache: Any) -> tuple[int, Tensor | None]:
    """The order that a cache's texts were put in last, and its number among all; 0 and None if they never were."""
    return (0, None) if cache is None else _orders.get(cache, (0, None))
