"""Mixtures of a map's heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.maps._columns import Segments
from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap

_NUMBERS_AT_ONCE = 2**22


class MixedHeads(Composed):
    """``P'_o = Σ_h w_oh P_h``; ``A.mix_heads(weights)`` and ``A.mean_heads()`` make it.

    Args:
        part: P, (B, H, N, M).
        weights: w, (H_out, H) or (B|1, H_out, H).

    Raises:
        ValueError: weights of another shape.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 4, 50, 16)
    >>> A = regard.AttentionMap(q, k)
    >>> A.mix_heads(torch.randn(3, 4)).shape, A.mean_heads().entropy().shape
    ((1, 3, 50, 50), torch.Size([1, 1, 50]))
    """

    def __init__(self, part: TokenMap, weights: Tensor) -> None:
        super().__init__(part)
        batch, heads, *_ = part.shape
        sizes = tuple(weights.shape)
        fits = len(sizes) in (2, 3) and sizes[-1] == heads and sizes[-2] > 0 and sizes[:-2] in ((), (1,), (batch,))
        if not fits:
            raise ValueError(
                f"mix_heads() needs weights of shape (heads out, {heads}) or ({batch} or 1, heads out, {heads}), got {sizes}"
            )
        self.part = part
        self.weights = weights.to(part.device, part.dtype).reshape(-1, *sizes[-2:])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H_out, N, M)."""
        batch, _, queries, keys = self.part.shape
        return batch, self.weights.shape[1], queries, keys

    def heads(self, index: list[int]) -> TokenMap:
        """Those of the mixtures."""
        chosen = self._positions(index, self.shape[1], "heads", "heads")
        return MixedHeads(self.part, self.weights[:, chosen])

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return MixedHeads(self.part._restricted(rows, keys), self.weights)

    @property
    def _row_totals(self) -> Tensor | None:
        totals, weights = self.part._row_totals, self.weights.detach()
        if totals is None or bool((weights < 0).any()):
            return None
        return weights @ totals.expand(-1, self.part.shape[1], -1)

    def _mix(self, answer: Tensor) -> Tensor:
        """From one answer of each head, (B, H, …), to one of each mixture."""
        mixed = self.weights @ answer.to(self.dtype).flatten(2)
        return mixed.reshape(*mixed.shape[:2], *answer.shape[2:])

    def _through(self, multiply: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
        """A product with columns (B|1, H_out|1, …, W): those of its own for each mixture ride side by side, some at once."""
        if columns.shape[1] == 1:
            return self._mix(multiply(columns))
        width = columns.shape[3]
        at_once = max(1, _NUMBERS_AT_ONCE // (self._numbers * width))
        products = []
        for own, weights in zip(columns.split(at_once, dim=1), self.weights.split(at_once, dim=1), strict=True):
            every = multiply(own.transpose(1, 2).flatten(2)[:, None]).unflatten(3, (-1, width)).to(self.dtype)
            batch = max(len(every), len(weights))
            products.append(torch.einsum("boh,bhnow->bonw", weights.expand(batch, -1, -1), every))
        return torch.cat(products, dim=1)

    def _product(self, values: Tensor) -> Tensor:
        return self._through(self.part._product, values)

    def _transposed(self, weights: Tensor) -> Tensor:
        return self._through(self.part._transposed, weights)

    def _mass(self, segments: Segments) -> Tensor:
        return self._mix(self.part.mass(segments))

    def _expect(self, question: str, *arguments: object) -> None:
        if question == "mass":
            self.part._expect(question, *arguments)

    def _entries(self, targets: Tensor) -> Tensor:
        return self._mix(self.part._entries(targets))

    def _some_rows(self, index: Tensor) -> Tensor:
        return self._mix(self.part._some_rows(index))

    def _some_columns(self, index: Tensor) -> Tensor:
        return self._mix(self.part._some_columns(index))
