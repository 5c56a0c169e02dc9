"""Texts packed into one sequence, each of which sees itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Mask):
    """``ids[i] == ids[j]``; see `documents`."""

    ids: Tensor

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether query and key are of one document."""
        return self._of(batch, query) == self._of(batch, key)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the least and the largest document of each tile: exact where they follow each other in order."""
        first, last = tiling.query_span(self._of(tiling.batch, tiling.query))
        first_key, last_key = tiling.key_span(self._of(tiling.batch, tiling.key))
        seen = (first <= last_key) & (first_key <= last)
        return known(seen, (first == last_key) & (first_key == last), certain=self._in_order)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """As many tokens as were named, and as many batch elements."""
        tokens = self.ids.shape[-1]
        if max(queries, keys) > tokens:
            raise ValueError(f"documents: of {tokens} tokens, but the call reaches {queries} queries and {keys} keys")
        if self.ids.ndim == 2 and len(self.ids) != batch:
            raise ValueError(f"documents: ids of {len(self.ids)} batch elements, but a batch of {batch}")

    @cached_property
    def _in_order(self) -> bool:
        return bool((self.ids.diff(dim=-1) >= 0).all())

    def _of(self, batch: Tensor, position: Tensor) -> Tensor:
        return self.ids[position] if self.ids.ndim == 1 else self.ids[batch, position]

    def __repr__(self) -> str:
        if self.ids.ndim == 2:
            return f"documents(ids of shape {tuple(self.ids.shape)})"
        lengths = torch.unique_consecutive(self.ids, return_counts=True)[1].tolist()
        return f"documents({lengths})" if len(lengths) <= 8 else f"documents({len(lengths)} of {len(self.ids)} tokens)"


def documents(
    lengths: Sequence[int] | Tensor | None = None, *, ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Documents:
    """Queries see the keys of their own document: packed texts give what they would give one by one.

    Args:
        lengths: tokens of each document, one after another.
        ids: or the document of each token, (N,) or (B, N).
        cu_seqlens: or where each begins and the last one ends, as in flash-attention's variable lengths.

    >>> from regard import masks
    >>> masks.documents([2, 1]).dense(1, 1, 3, 3)[0, 0].int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    >>> masks.documents(cu_seqlens=torch.tensor([0, 2, 3])) & masks.causal()
    documents([2, 1]) & causal()
    """
    if sum(given is not None for given in (lengths, ids, cu_seqlens)) != 1:
        raise ValueError("documents: pass one of lengths, ids and cu_seqlens")
    if ids is not None:
        if ids.is_floating_point() or ids.ndim not in (1, 2) or ids.numel() == 0:
            raise ValueError(f"documents: ids are integers, (N,) or (B, N); got {ids.dtype} {tuple(ids.shape)}")
        return Documents(ids)
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or int(cu_seqlens[0]) != 0:
            raise ValueError(f"documents: cu_seqlens goes from 0 to the number of tokens; got {cu_seqlens.tolist()}")
        lengths = cu_seqlens.diff()
    counts = torch.as_tensor(lengths)
    if counts.is_floating_point() or counts.ndim != 1 or len(counts) == 0 or int(counts.min()) < 0:
        raise ValueError(f"documents: lengths are numbers of tokens, got {lengths!r}")
    if not int(counts.sum()):
        raise ValueError("documents: no document has a token")
    return Documents(torch.arange(len(counts), device=counts.device).repeat_interleave(counts))
