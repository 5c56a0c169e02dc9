"""What somebody wants to know of the matrix of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.maps import TokenMap


@dataclass(frozen=True)
class Reading:
    """Questions about the matrix that is run in the end, whatever edits made of the call on its way.

    ``ask`` gets the matrix and the call at the end of its chain, announces its questions, so that one pass over the matrix
    answers those of everybody, and returns what takes the answers. ``shares`` tells whether the model's output may come from
    the pass that answers.
    """

    ask: Callable[[TokenMap, Any], Callable[[], None]]
    shares: bool = True
