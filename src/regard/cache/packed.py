"""Keys and values with few bits each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Numbers (B, h, n, D) as whole numbers of few bits: ``code · scale + zero``, scale and zero for each group along a dim.

    ``codes`` are (B, h, n, D) bytes, or with 4 bits (B, h, n / 2, D): two tokens in each. ``scale`` and ``zero`` have one
    number where the codes have a group, and are of the numbers' own type.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dim: int

    @classmethod
    def of(cls, numbers: Tensor, bits: int, dim: int, group: int) -> Packed:
        """Numbers (B, h, n, D), so many of which along the dim have one scale and one zero."""
        grouped = numbers.unflatten(dim, (-1, group))
        low, high = grouped.amin(dim=dim + 1), grouped.amax(dim=dim + 1)
        most = 2**bits - 1
        scale = ((high.float() - low.float()) / most).to(numbers.dtype)
        steps = (grouped.float() - low.float().unsqueeze(dim + 1)) / scale.float().unsqueeze(dim + 1)
        codes = steps.nan_to_num(0.0, most, 0.0).round().clamp(0, most).to(torch.uint8).flatten(dim, dim + 1)
        if bits == 4:
            codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
        return cls(codes, scale, low, bits, dim)

    def unpack(self) -> Tensor:
        """The numbers (B, h, n, D), as near as the bits allow."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)
        grouped = codes.unflatten(self.dim, (self.scale.shape[self.dim], -1)).float()
        numbers = grouped * self.scale.float().unsqueeze(self.dim + 1) + self.zero.float().unsqueeze(self.dim + 1)
        unpacked: Tensor = numbers.flatten(self.dim, self.dim + 1).to(self.scale.dtype)
        return unpacked

    @property
    def bytes(self) -> int:
        """What codes, scales and zeros take."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.scale, self.zero))

    def change(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """With other rows or heads, the same for all that has some of each."""
        return replace(self, codes=change(self.codes), scale=change(self.scale), zero=change(self.zero))

    @staticmethod
    def joined(parts: list[Packed], dim: int) -> Packed:
        """Parts one after the other, along the dim of heads or of tokens."""
        codes, scale, zero = (
            torch.cat([getattr(part, name) for part in parts], dim=dim) for name in ("codes", "scale", "zero")
        )
        return replace(parts[0], codes=codes, scale=scale, zero=zero)


@dataclass(frozen=True)
class PackedEntries:
    """Entries of some key heads with few bits: their keys, their values, and ``positions`` (B, h, n), −1 for none."""

    keys: Packed
    values: Packed
    positions: Tensor

    @property
    def length(self) -> int:
        """Entries of each head."""
        return int(self.positions.shape[2])

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return self.keys.bytes + self.values.bytes

    def change(self, change: Callable[[Tensor], Tensor]) -> PackedEntries:
        """With other rows or heads, the same for all that has some of each."""
        return PackedEntries(self.keys.change(change), self.values.change(change), change(self.positions))

    @staticmethod
    def joined(parts: list[PackedEntries], dim: int) -> PackedEntries:
        """Parts one after the other, along the dim of heads, 1, or of tokens, 2."""
        return PackedEntries(
            Packed.joined([part.keys for part in parts], dim),
            Packed.joined([part.values for part in parts], dim),
            torch.cat([part.positions for part in parts], dim=dim),
        )
