"""The last queries of a text, kept for a policy that reads what they attend to once it is time to compress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """Queries (B, Hq, n, D) of one call, of which ``chosen`` (B, n) are of real tokens; None if all are.

    They stand at ``positions`` (B or 1, n). ``mask`` (B or 1, Hq or 1, n, tokens then) tells what each may see; None if that
    is all up to itself.
    """

    query: Tensor
    mask: Tensor | None
    chosen: Tensor | None
    positions: Tensor

    @property
    def length(self) -> int:
        """Queries of each text."""
        return int(self.query.shape[2])

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Window:
        """Of other texts of the batch, or in another order."""
        mask, batch = self.mask, len(self.query)
        return replace(
            self,
            query=change(self.query),
            mask=None if mask is None else change(mask.expand(batch, -1, -1, -1)),
            chosen=None if self.chosen is None else change(self.chosen),
            positions=change(self.positions.expand(batch, -1)),
        )

    def places(self, batch: int) -> Tensor:
        """(B, n): where the queries stand, −1 for padding."""
        places = self.positions.expand(batch, -1)
        return places if self.chosen is None else places.masked_fill(~self.chosen, -1)

    def without_last(self, tokens: int) -> Window:
        """Without so many last queries."""
        end = self.length - tokens
        mask = None if self.mask is None else self.mask[:, :, :end]
        return replace(
            self, query=self.query[:, :, :end], mask=mask, positions=self.positions[:, :end],
            chosen=None if self.chosen is None else self.chosen[:, :end],
        )  # fmt: skip


def last_queries(query: Tensor, mask: Tensor | None, real: Tensor | None, seen: int, number: int) -> Window:
    """The last real queries of each text, at most so many, of a call's (B, Hq, N, D), whose last stands at ``seen`` − 1."""
    tokens = query.shape[2]
    if mask is None or real is None:
        number = min(number, tokens)
        query = query if number == tokens else query[:, :, -number:].clone()
        return Window(query.detach(), None, None, torch.arange(seen - number, seen, device=query.device)[None])
    positions = torch.arange(seen - tokens, seen, device=query.device)[None]
    chosen = real[:, -tokens:]
    if number < tokens:
        place = torch.where(chosen, torch.arange(tokens, device=query.device), -1).topk(number, dim=1).values.flip(1)
        positions = positions.expand(len(query), -1).gather(1, place.clamp(min=0))
        chosen, index = place >= 0, place.clamp(min=0)[:, None, :, None]
        query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        mask = mask.expand(len(query), -1, tokens, -1)
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
    return Window(query.detach(), mask.detach(), chosen, positions)


def joined(windows: list[Window], seen: int, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries (B, Hq, n, D), what of the ``seen`` tokens they may see, and which (B, n) are the last so many of a text."""
    query = torch.cat([window.query for window in windows], dim=2)
    masks = [_mask(window, seen) for window in windows]
    additive = next((mask for mask in masks if mask.dtype != torch.bool), None)
    if additive is not None:
        masks = [_additive(mask, additive.dtype) for mask in masks]
    front = torch.broadcast_shapes(*(mask.shape[:2] for mask in masks))
    mask = torch.cat([mask.expand(*front, -1, -1) for mask in masks], dim=2)
    if all(window.chosen is None for window in windows):
        return query[:, :, -number:], mask[:, :, -number:], None
    parts = [window.chosen for window in windows]
    ones = query.new_ones(len(query), 1, dtype=torch.bool)
    chosen = torch.cat(
        [ones.expand(-1, w.length) if part is None else part for w, part in zip(windows, parts, strict=True)], dim=1
    )
    return query, mask, chosen & (chosen.flip(1).cumsum(1).flip(1) <= number)


def _mask(window: Window, seen: int) -> Tensor:
    """What a window's queries may see of the text as it is now: of later tokens nothing."""
    mask, device = window.mask, window.query.device
    if mask is None:
        return (torch.arange(seen, device=device) <= window.positions[..., None])[:, None]
    hidden = False if mask.dtype == torch.bool else -math.inf
    return functional.pad(mask, (0, seen - mask.shape[3]), value=hidden)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
