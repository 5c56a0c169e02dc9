"""Keys that every query sees, and queries that see every key: the global tokens of sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.masks.mask import Mask
from regard.masks.tiles import Tiles, Tiling, known
from regard.tokens import Positions
from regard.tokens.positions import plain


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(Mask):
    """Pairs by one of their two positions alone; see `keys` and `queries`. ``positions`` are in order, each once."""

    positions: Tensor
    of_keys: bool

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key, or the query, is one of the chosen."""
        here = (key if self.of_keys else query).contiguous()
        return self._before(here + 1) > self._before(here)

    def tiles_of(self, tiling: Tiling) -> Tiles:
        """From how many of the chosen lie between the first and last token of each tile."""
        first, last = tiling.key_span(tiling.key) if self.of_keys else tiling.query_span(tiling.query)
        chosen = self._before(last.contiguous() + 1) - self._before(first.contiguous())
        return known(chosen > 0, chosen == last - first + 1, certain=True)

    def _before(self, position: Tensor) -> Tensor:
        """How many of the chosen lie before a position."""
        return torch.searchsorted(self.positions, position)

    def __repr__(self) -> str:
        return f"{'keys' if self.of_keys else 'queries'}({self.positions.tolist()})"


def keys(where: Positions) -> Chosen:
    """Every query sees these keys, and no others: attention sinks, or global tokens.

    Positions are an index, a list, or a slice with an end. With a window that slides, the first keys are the sinks of
    G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2024).

    >>> from regard import masks
    >>> ((masks.window(left=1, right=0) | masks.keys([0])) & masks.causal()).dense(1, 1, 4, 4)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    return Chosen(_positions(where, "keys"), of_keys=True)


def queries(where: Positions) -> Chosen:
    """These queries see every key, the others none: with `keys`, the global tokens of I. Beltagy et al., "Longformer: The
    Long-Document Transformer" (2020).

    >>> from regard import masks
    >>> (masks.window(1, 1) | masks.keys([0]) | masks.queries([0])).dense(1, 1, 4, 4)[0, 0].int()
    tensor([[1, 1, 1, 1],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    return Chosen(_positions(where, "queries"), of_keys=False)


def _positions(where: Positions, what: str) -> Tensor:
    read = plain(where, what)
    if isinstance(read, slice):
        if read.stop is None or min(read.start or 0, read.stop) < 0 or (read.step or 1) < 1:
            raise ValueError(f"{what} of a rule need a first and a last, for it knows no text's length; got {where!r}")
        return torch.arange(read.start or 0, read.stop, read.step or 1)
    if isinstance(read, Tensor):
        if read.ndim != 1:
            raise ValueError(
                f"{what} of a rule must be the same for all texts, got a mask of shape {tuple(read.shape)}"
            )
        chosen: Tensor = read.nonzero().squeeze(-1)
        return chosen
    if not all(isinstance(position, int) and position >= 0 for position in read):
        raise ValueError(f"{what} of a rule are numbers that count from the text's begin; got {where!r}")
    numbers: Tensor = torch.tensor(read, dtype=torch.long).unique()
    return numbers
