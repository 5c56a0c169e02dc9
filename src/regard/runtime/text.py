"""One text as one layer sees it: where in it each call's queries and keys stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Text:
    """A text that calls go on with, one after the other. ``generate`` makes one for the prompt and one for each step."""

    token_ids: Tensor | None = None
    end: int = 0
    keys: int = 0
    batch: int = 0
    _first: Tensor | None = None  # values of the first call
    _first_keys: int = 0  # and how many keys it had

    def place(self, value: Tensor, queries: int, past: int | None) -> tuple[bool, int, int]:
        """Whether a call goes on with this text, and the positions of its first query and key.

        ``value`` is the call's, whose keys stand where they do; ``past`` the number of tokens before its own, None if that
        is not known.
        """
        batch, _, keys, _ = value.shape
        longer = keys == self.keys + queries if past is None else past == self.end
        continues = self.end > 0 and longer and batch == self.batch
        start = self.end if continues else past or 0
        if not start or keys >= start + queries:
            return continues, start, 0
        # Cross-attention has the same keys at every step; a sliding window drops the first.
        return continues, start, 0 if continues and self._has_keys_of(value) else start + queries - keys

    def _has_keys_of(self, value: Tensor) -> bool:
        """Whether a call's keys are the first call's. Some of them tell, but not one: the same word may come again."""
        return value.shape[2] == self._first_keys and self._first is not None and torch.equal(self._first, _some(value))

    def extend(self, value: Tensor, queries: int, query_start: int, token_ids: Tensor | None) -> None:
        """Take note of a call that goes on with this text, and of the ids of all its tokens."""
        self.batch, self.keys = value.shape[0], value.shape[2]
        self.end = query_start + queries
        if self._first is None:
            self._first, self._first_keys = _some(value).detach().clone(), value.shape[2]
        self.token_ids = token_ids


def _some(value: Tensor) -> Tensor:
    """Those of some eight keys, the last among them, in the first head: the others may be repeated, or not."""
    step = max(1, value.shape[2] // 8)
    return value[:, 0, (value.shape[2] - 1) % step :: step]
