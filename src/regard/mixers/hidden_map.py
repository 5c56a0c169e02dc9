"""The attention matrix that a linear mixer hides: an operator on values, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from regard.maps import Segment, Segments, TokenMap, TopK, indicator_columns, one_hot, positions

_NUMBERS_AT_ONCE = 2**22

Apply = Callable[[Tensor], Tensor]
"""From values (B, H, M, W) to outputs (B, H, N, W)."""


class HiddenMap(TokenMap):
    """``P`` of a mixer whose output is ``P V`` for values V, with the interface of `regard.AttentionMap`.

    P is known by what it does to values alone, so that one form fits every such mixer, whatever its recurrence. Its entries
    may be negative, and its rows need not sum to 1: there is no entropy and no logsumexp, and which keys a query could see
    is not known. Entries are read some columns at a time, or some rows, never all at once.

    Args:
        apply: from values (B, H, M, W) to outputs (B, H, N, W), linear and differentiable.
        shape: (B, H, N, M).
        values: V, (B, H, M, D), which the mixer mixes. Statistics come in its precision, float32 at least.

    Raises:
        ValueError: values of another shape.
        NotImplementedError: for a question that has no answer here.

    >>> import torch
    >>> from regard.mixers.linear import linear_attention
    >>> q, k, v = torch.randn(3, 1, 2, 50, 16)
    >>> P = HiddenMap(lambda v: linear_attention(q, k, v)[0], (1, 2, 50, 50), v)
    >>> bool(torch.allclose(P.dense(), (q @ k.mT).tril(), atol=1e-4))
    True
    """

    def __init__(self, apply: Apply, shape: tuple[int, int, int, int], values: Tensor) -> None:
        batch, heads, _, keys = shape
        if values.ndim != 4 or values.shape[:3] != (batch, heads, keys):
            raise ValueError(
                f"a map of shape {shape} mixes values of shape ({batch}, {heads}, {keys}, width), "
                f"got {tuple(values.shape)}"
            )
        self._apply = apply
        self._shape = shape
        self._numbers = math.prod(shape[:3])  # that `apply` gives for one column
        self.values = values

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return torch.promote_types(self.values.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.values.device

    def __repr__(self) -> str:
        return f"HiddenMap(shape={self.shape}, dtype={self.dtype})"

    def heads(self, index: list[int]) -> HiddenMap:
        """The map of these heads alone; it costs what that of all costs.

        >>> import torch
        >>> from regard.mixers.linear import DeltaRule
        >>> DeltaRule(32, heads=4).map(torch.randn(1, 10, 32)).heads([0, 3]).shape
        (1, 2, 10, 10)
        """
        batch, heads, queries, keys = self.shape
        chosen = positions(index, heads, "heads", "heads").to(self.device)

        def apply(values: Tensor) -> Tensor:
            every = values.new_zeros(batch, heads, keys, values.shape[3]).index_copy(1, chosen, values)
            return self._apply(every)[:, chosen]

        view = HiddenMap(apply, (batch, len(chosen), queries, keys), self.values[:, chosen])
        view._numbers = self._numbers
        return view

    def rearranged(self, order: Tensor, real: Tensor) -> HiddenMap:
        """The map of texts whose last tokens stood in another order when this one was made, without those not real.

        Args:
            order: (B, N), which token of a text came at each place.
            real: (B, N), of the tokens as they are to stand, false for padding: its rows and columns become 0.
        """
        batch, _, queries, keys = self.shape
        before = torch.arange(keys - queries, device=order.device).expand(batch, -1)
        own, every = order[:, None, :, None], torch.cat([before, order + keys - queries], dim=1)[:, None, :, None]
        rows = real[:, None, :, None]
        columns = torch.cat([torch.ones_like(before, dtype=torch.bool), real], dim=1)[:, None, :, None]

        def moved(tensor: Tensor, places: Tensor) -> Tensor:
            return torch.zeros_like(tensor).scatter(2, places.expand_as(tensor), tensor)

        def apply(values: Tensor) -> Tensor:
            values = values.masked_fill(~columns, 0.0)
            return moved(self._apply(values.gather(2, every.expand_as(values))), own).masked_fill(~rows, 0.0)

        return HiddenMap(apply, self.shape, moved(self.values, every).masked_fill(~columns, 0.0))

    # --- products -----------------------------------------------------------------------------------------------------

    def __matmul__(self, values: Tensor) -> Tensor:
        """``P V``: (B, H, N, W), in V's dtype, from V (B|1, H|1, M, W)."""
        batch, heads, _, keys = self.shape
        sizes = tuple(values.shape)
        if len(sizes) != 4 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2] != keys:
            raise ValueError(f"A @ V needs V of shape ({batch} or 1, {heads} or 1, {keys}, width), got {sizes}")
        return self._apply(values.to(self.device, self.dtype).expand(batch, heads, -1, -1)).to(values.dtype)

    def _transposed(self, weights: Tensor) -> Tensor:
        """The derivative of P V by V, which is what autograd computes."""
        batch, heads, _, keys = self.shape
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            values = torch.zeros(batch, heads, keys, weights.shape[3], device=self.device, dtype=self.dtype)
            product = self._apply(values.requires_grad_())
            weights = weights.to(product)
            return torch.autograd.grad(product, values, weights, create_graph=differentiable)[0]

    def received(self, weights: Tensor | None = None) -> Tensor:
        """What each key receives, ``Σ_i w_i P_ij``: (B, H, M), from weights (B|1, H|1, N), ones by default."""
        if weights is None:
            weights = torch.ones(1, 1, self.shape[2], device=self.device)
        return (self.T @ self._weight_column(weights)[..., None]).squeeze(-1)

    def mass(self, segments: Segments) -> Tensor:
        """What each query gives to sets of keys: (B, H, N, S)."""
        batch, _, _, keys = self.shape
        return self @ indicator_columns(segments, keys, batch, self.device).to(self.dtype)

    def _expect(self, question: str, *arguments: object) -> None:
        """Nothing is shared: each question is a pass of its own."""
        if question == "entropy":
            self.entropy()

    # --- entries ------------------------------------------------------------------------------------------------------

    def tile(self, rows: Segment, columns: Segment) -> Tensor:
        """A block of P: (B, H, len(rows), len(columns)); costs the smaller of both, some of them at a time."""
        *_, queries, keys = self.shape
        across = positions(rows, queries, "rows", "queries").to(self.device)
        down = positions(columns, keys, "columns", "keys").to(self.device)
        if len(across) < len(down):
            return torch.cat([self._some_rows(part)[..., down] for part in across.split(self._at_once)], dim=2)
        return torch.cat([self._some_columns(part)[:, :, across] for part in down.split(self._at_once)], dim=3)

    @property
    def _at_once(self) -> int:
        """Columns, or rows, that are computed together."""
        return max(1, _NUMBERS_AT_ONCE // self._numbers)

    def _some_rows(self, index: Tensor) -> Tensor:
        return (self.T @ one_hot(index, self.shape[2], self.dtype).mT).mT

    def _some_columns(self, index: Tensor) -> Tensor:
        return self @ one_hot(index, self.shape[3], self.dtype).mT

    def _strips(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys, and their columns of P (B, H, N, some)."""
        for index in torch.arange(self.shape[3], device=self.device).split(self._at_once):
            yield index, self._some_columns(index)

    def _entries(self, targets: Tensor) -> Tensor:
        batch, heads, queries, _ = self.shape
        found = torch.zeros(batch, heads, queries, dtype=self.dtype, device=self.device)
        for keys, columns in self._strips():
            place = targets - keys[0]
            here = ((place >= 0) & (place < len(keys)))[:, None]
            place = place.clamp(0, len(keys) - 1)[:, None, :, None].expand(-1, heads, -1, -1)
            found = torch.where(here, columns.gather(3, place).squeeze(3), found)
        return found

    # --- orderings and distances --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _topk(self, k: int) -> TopK:
        shares = torch.empty(*self.shape[:3], 0, dtype=self.dtype, device=self.device)
        keys = torch.empty(shares.shape, dtype=torch.long, device=self.device)
        for index, columns in self._strips():
            shares = torch.cat([shares, columns], dim=3)
            keys = torch.cat([keys, index.expand_as(columns)], dim=3)
            shares, best = shares.topk(min(k, shares.shape[3]), dim=3)
            keys = keys.gather(3, best)
        return TopK(shares, keys.masked_fill(shares == 0, -1))

    @torch.no_grad()
    def mean_distance(self, query_start: int = 0, key_start: int = 0) -> Tensor:
        """``Σ_j P_ij |i − j|``: (B, H, N), in tokens; not differentiable."""
        queries = torch.arange(self.shape[2], device=self.device) + query_start
        total = torch.zeros(self.shape[:3], dtype=self.dtype, device=self.device)
        for keys, columns in self._strips():
            total += (columns * (queries[:, None] - key_start - keys).abs()).sum(dim=3)
        return total

    # --- what it has no answer to -------------------------------------------------------------------------------------

    def entropy(self) -> NoReturn:
        """None: rows are no probabilities."""
        self._refuse("entropy", "its entries may be negative, and its rows need not sum to 1")

    def logsumexp(self) -> NoReturn:
        """None: there are no logits."""
        self._refuse("logsumexp", "its entries are not made of logits by a softmax")

    def viewers(self, weights: Tensor | None = None) -> NoReturn:
        """None: it is not known which keys a query could see."""
        self._refuse("viewers", "which keys a query could see is not known")

    def _refuse(self, question: str, reason: str) -> NoReturn:
        raise NotImplementedError(
            f"a hidden map has no {question}: {reason}. It has products, received, mass, pool, at, rows, topk, max and "
            "mean_distance"
        )
