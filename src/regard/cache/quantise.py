"""Entries that are kept with few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard.cache.packed import Packed, PackedEntries
from regard.cache.ranks import ranks
from regard.cache.rest import Rest

if TYPE_CHECKING:
    from regard.cache.head_group import HeadGroup
    from regard.cache.layer import KeptLayer
    from regard.cache.policy import Entries


@dataclass(frozen=True, kw_only=True)
class Quantise(Rest):
    """Keep entries that are not kept whole with few bits, ``x ≈ code · scale + zero``: calls go on reading them.

    Keys have a scale and a zero point for each channel, over ``group`` tokens that follow one another in the cache; values
    have them for each token, over ``group`` channels (all where these cannot be cut so). So it takes a full group to
    quantise: up to ``group − 1`` entries beside the budget stay whole until there is one. Which entries are whole is for the
    policy to choose, but what has lost its digits stays so. Two codes of 4 bits share a byte, and the report counts the
    bytes of codes, scales and zero points.

    With the last tokens whole, ``StreamingLLM(128, sinks=0, rest=Quantise(bits=4))``, it is KIVI's cache, whose bits are 2 or
    4; with the best ones by what they receive, ``ObservedAttention(0.2, rest=Quantise(bits=4))``, that of MiKV.

    Args:
        bits: of each number, 8 or 4.
        group: numbers that share a scale and a zero point, an even number.

    Z. Liu et al. (2024), KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache.
    J. Y. Yang et al. (2024), No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
    Quantization (MiKV).

    Raises:
        ValueError: other bits; an odd group, or none.

    >>> import torch, regard
    >>> model, tokenizer = regard.mini()
    >>> policy = regard.cache.StreamingLLM(budget=32, sinks=0, rest=regard.cache.Quantise(bits=4))
    >>> with torch.no_grad(), regard.compress(model, policy) as cache:
    ...     _ = model(torch.arange(10, 138)[None])
    >>> cache.report().layers[0].kept, cache.report().layers[0].quantised
    ([32, 32, 32, 32], [96, 96, 96, 96])
    >>> print(f"{cache.report().bytes / cache.report().full_bytes:.2f}")
    0.39
    """

    bits: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            raise ValueError(f"Quantise: bits must be 8 or 4, got {self.bits!r}")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 2 or self.group % 2:
            raise ValueError(f"Quantise: group must be an even number of at least 2, got {self.group!r}")

    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Have the layer pack full groups of the entries that are not kept, from the first on."""
        goes = entries.real & (ranks(scores) >= counts[..., None])
        number = goes.sum(dim=-1, keepdim=True) // self.group * self.group
        layer.pack(entries.real, goes & (goes.cumsum(dim=-1) <= number), self.pack)

    def pack(self, group: HeadGroup) -> PackedEntries:
        """A group's entries with few bits."""
        width = group.values.shape[3]
        return PackedEntries(
            Packed.of(group.keys, self.bits, 2, self.group),
            Packed.of(group.values, self.bits, 3, width if width % self.group else self.group),
            group.all_positions(),
        )
