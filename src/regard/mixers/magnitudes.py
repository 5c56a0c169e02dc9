"""The matrices that mixers hide by the size of their entries, so that they are read as attention is."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import AttentionCall, HiddenCall, Proceed, Site

_HEADS, _CHANNELS, _TOKENS = 64, 256, 1024
_NUMBERS_AT_ONCE = 2**25


class Magnitudes(TokenMap):
    """``|P_ij| / Σ_j |P_ij|`` of a map P whose entries have any sign: how much each token counts in a row, not which way.

    A. Ali et al. (2024), The Hidden Attention of Mamba Models, look at such matrices of Mamba. The matrix is stored; of
    more than 64 heads, as channels are, the mean alone, over 256 of them at even distances.

    Args:
        of: the map, of 1,024 tokens at most.

    Raises:
        ValueError: more tokens.

    >>> import torch
    >>> from regard.mixers import DeltaRule
    >>> sizes = Magnitudes(DeltaRule(32, heads=4).map(torch.randn(1, 10, 32)))
    >>> sizes.shape, sizes.entropy().shape
    ((1, 4, 10, 10), torch.Size([1, 4, 10]))
    """

    def __init__(self, of: TokenMap) -> None:
        batch, heads, queries, keys = of.shape
        if max(queries, keys) > _TOKENS:
            raise ValueError(
                f"the hidden matrix of a mixer is read by the size of its entries up to {_TOKENS:,} tokens, got {queries:,}; "
                f"pass --max-tokens {_TOKENS}"
            )
        chosen = _spread(heads)
        step = max(1, _NUMBERS_AT_ONCE // (batch * queries * keys))
        groups = [chosen[start : start + step] for start in range(0, len(chosen), step)]
        identity = torch.eye(keys, dtype=of.dtype, device=of.device)[None, None]
        shares = (self._shares(of.heads(group) @ identity) for group in groups)
        if heads <= _HEADS:
            self._matrix = torch.cat(list(shares), dim=1)
        else:
            summed = (part.sum(1, keepdim=True) for part in shares)
            self._matrix = reduce(torch.add, summed) / len(chosen)

    @staticmethod
    def _shares(entries: Tensor) -> Tensor:
        sizes = entries.abs()
        totals = sizes.sum(-1, keepdim=True)
        return sizes / totals.where(totals > 0, 1)

    def __repr__(self) -> str:
        return f"Magnitudes(shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H or 1, N, M)."""
        batch, heads, queries, keys = self._matrix.shape
        return batch, heads, queries, keys

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self._matrix.device

    def heads(self, index: list[int]) -> Magnitudes:
        """The map of these heads alone."""
        view = object.__new__(Magnitudes)
        view._matrix = self._matrix[:, index]
        return view

    def _product(self, values: Tensor) -> Tensor:
        return self._matrix @ values.to(self.device, self.dtype)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self._matrix.mT @ weights.to(self.device, self.dtype)

    @property
    def _row_totals(self) -> Tensor:
        return self._matrix.new_ones(1, 1, 1)  # a row of zeros falls to no key


def _spread(heads: int) -> list[int]:
    """All heads, or so many of them as are read, at even distances."""
    number = min(heads, _CHANNELS)
    return [index * heads // number for index in range(number)]


class InMagnitudes:
    """Has mixers be read by the size of what they hide, in place of its signs; ``read`` names those that were."""

    edits = outermost = False

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        """How many heads or channels each call has, by its path."""

    def notes(self) -> list[str]:
        """A line on what was read so, if anything was."""
        if not self.read:
            return []
        channels = max(self.read.values())
        some = f"{_CHANNELS} of its" if channels > _CHANNELS else "its"
        mean = f", the mean over {some} {channels:,} channels" if channels > _HEADS else ""
        return [
            f"layers without attention, {len(self.read)} of them, are shown by the size of the entries of the matrix that "
            f"each hides, every row divided by its sum{mean}; signs are not shown"
        ]

    def wants(self, site: Site) -> bool:
        """Whether a call may be a mixer's: any may."""
        return True

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output."""
        if not isinstance(call, HiddenCall):
            return proceed(call)
        self.read[call.place.path] = call.value.shape[1]
        hidden = call.map
        by_size = HiddenCall(
            call.value, call.queries, lambda place: Magnitudes(hidden(place)), call.place, call.readings
        )
        return proceed(by_size)
