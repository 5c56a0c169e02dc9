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
    _last_key: Tensor | None = None  # of the first call

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
        # Cross-attention and preallocated caches have the same keys at every step; a sliding window drops the first.
        fixed = continues and self._last_key is not None and torch.equal(self._last_key, value[..., -1, :])
        return continues, start, 0 if fixed else start + queries - keys

    def extend(self, value: Tensor, queries: int, query_start: int, token_ids: Tensor | None) -> None:
        """Take note of a call that goes on with this text, and of the ids of all its tokens."""
        self.batch, self.keys = value.shape[0], value.shape[2]
        self.end = query_start + queries
        if self._last_key is None:
            self._last_key = value[..., -1, :].detach().clone()
        self.token_ids = token_ids
