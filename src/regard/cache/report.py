"""What a compressed cache holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """One layer: the number in the model, entries of each head (the most of any text of the batch), tokens, and bytes.

    ``positions`` (batch, heads, tokens) tells which tokens are left. A layer with a ``window`` was left alone. ``whole``
    texts of the batch were too short for the policy to drop any of their entries. Beside those that are kept as they are,
    ``unread`` entries of each head are in memory, and ``quantised`` ones with few bits.
    """

    layer: int
    kept: list[int]
    seen: int
    bytes: int
    full_bytes: int
    positions: Tensor
    window: bool = False
    whole: int = 0
    unread: list[int] = field(default_factory=list)
    quantised: list[int] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Report:
    """What is kept, by layer and head; print it."""

    layers: list[LayerReport]
    policy: str
    frees: bool

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that are held."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes that all tokens would take."""
        return sum(layer.full_bytes for layer in self.layers)

    @property
    def kept(self) -> float:
        """The share of entries that are kept, of the layers without a window."""
        counted = [layer for layer in self.layers if not layer.window]
        if not counted:
            return 1.0
        entries = sum(sum(layer.kept) for layer in counted)
        return entries / max(sum(len(layer.kept) * layer.seen for layer in counted), 1)

    def __str__(self) -> str:
        """A table, a line for each layer."""
        lines = [f"{self.policy}: {self.kept:.1%} of the entries, {_size(self.bytes)} of {_size(self.full_bytes)}"]
        if self.layers and all(layer.window for layer in self.layers):
            lines.append("(nothing is dropped: every layer keeps a sliding window, and no more than it)")
        if not self.frees:
            lines.append("(entries that are not attended to stay in memory)")
        whole = max((layer.whole for layer in self.layers), default=0)
        if whole:
            texts = f"{whole} texts are" if whole > 1 else "1 text is"
            lines.append(f"({texts} kept whole: the budget is less than the policy always keeps)")
        for layer in self.layers:
            note = " (sliding window, left alone)" if layer.window else ""
            others = {"unread": layer.unread, "quantised": layer.quantised}
            beside = "".join(f", {_of_heads(numbers)} {what}" for what, numbers in others.items() if any(numbers))
            lines.append(
                f"layer {layer.layer:>3}: {_of_heads(layer.kept)} of {layer.seen} tokens{beside}, "
                f"{_size(layer.bytes)} of {_size(layer.full_bytes)}{note}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def report(cache: Any, policy: str, frees: bool) -> Report:
    """The report of a cache of transformers whose layers were adopted."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from regard.cache.layer import KeptLayer

    layers = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, KeptLayer) and layer.groups:
            layers.append(_of_kept(number, layer))
        elif isinstance(layer, DynamicSlidingWindowLayer) and isinstance(layer.keys, Tensor):
            layers.append(_of_window(number, layer))
    return Report(layers, policy, frees)


def _of_kept(number: int, layer: Any) -> LayerReport:
    heads = sum(len(group.heads) for group in layer.groups)
    batch = layer.groups[0].keys.shape[0]
    left = torch.zeros(batch, heads, layer.seen + 1, dtype=torch.bool)
    kept, unread, quantised = [0] * heads, [0] * heads, [0] * heads
    for group in layer.groups:
        positions = group.read_positions().cpu()
        index = torch.where(positions < 0, layer.seen, positions)
        left[:, group.heads] = left[:, group.heads].scatter(2, index, True)
        for head in group.heads:
            kept[head], unread[head] = positions.shape[2], group.length - positions.shape[2]
            quantised[head] = group.packed_length
    of_entry = sum(t.shape[3] * t.element_size() for t in (layer.groups[0].keys, layer.groups[0].values))
    full = batch * heads * layer.seen * of_entry
    whole = 0 if layer.whole is None else int(layer.whole.sum())
    return LayerReport(
        number, kept, layer.seen, layer.numbers(), full, left[..., :-1], whole=whole, unread=unread, quantised=quantised
    )


def _of_window(number: int, layer: Any) -> LayerReport:
    batch, heads, held, _ = layer.keys.shape
    seen = int(layer.get_seq_length())
    size = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    left = torch.zeros(batch, heads, seen, dtype=torch.bool)
    left[..., seen - held :] = True
    return LayerReport(number, [held] * heads, seen, size, size // max(held, 1) * seen, left, window=True)


def _of_heads(numbers: list[int]) -> str:
    """A number of entries, or that of each head."""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"heads {', '.join(map(str, numbers))}"


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
