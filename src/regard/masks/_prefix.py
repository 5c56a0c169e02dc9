"""A prefix that all tokens see, in both directions, and a causal text after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """``j < length`` or ``j ≤ i``; see `prefix`."""

    length: Tensor

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is in the prefix, or not after the query."""
        return (key < self._of(batch)) | (key <= query)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From the first and last token of each tile."""
        length = self._of(tiling.batch)
        first, last = tiling.query_span(tiling.query)
        first_key, last_key = tiling.key_span(tiling.key)
        return known(
            (first_key < length) | (first_key <= last), (last_key < length) | (last_key <= first), certain=True
        )

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """As many lengths as batch elements, or one."""
        if self.length.ndim and len(self.length) != batch:
            raise ValueError(f"prefix: {len(self.length)} lengths, but a batch of {batch}")

    def _of(self, batch: Tensor) -> Tensor:
        return self.length[batch] if self.length.ndim else self.length

    def __repr__(self) -> str:
        return f"prefix({self.length.tolist()})"


def prefix(length: int | Sequence[int] | Tensor) -> Prefix:
    """Query i sees the first ``length`` keys, and keys j ≤ i: a prefix language model, as in Raffel et al., "Exploring
    the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020). One length, or one of each batch element.

    >>> from regard import masks
    >>> masks.prefix(2).dense(1, 1, 4, 4)[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    lengths = torch.as_tensor(length)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.ndim > 1:
        raise ValueError(f"prefix: one number of tokens, or one of each batch element; got {length!r}")
    if lengths.numel() == 0 or int(lengths.min()) < 0:
        raise ValueError(f"prefix: a length is 0 or more; got {length!r}")
    return Prefix(lengths)
