"""The attention matrix that a linear mixer hides: an operator on values, never stored."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regard.maps import TokenMap, positions

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
        of_heads: from the numbers of some heads to what ``apply`` is of these alone, where that costs less than all.

    Raises:
        ValueError: values of another shape.
        NotImplementedError: for a question that has no answer here.

    >>> import torch
    >>> from regard.mixers import linear_attention
    >>> q, k, v = torch.randn(3, 1, 2, 50, 16)
    >>> P = HiddenMap(lambda v: linear_attention(q, k, v)[0], (1, 2, 50, 50), v)
    >>> bool(torch.allclose(P.dense(), (q @ k.mT).tril(), atol=1e-4))
    True
    """

    def __init__(
        self,
        apply: Apply,
        shape: tuple[int, int, int, int],
        values: Tensor,
        of_heads: Callable[[Tensor], Apply] | None = None,
    ) -> None:
        batch, heads, _, keys = shape
        if values.ndim != 4 or values.shape[:3] != (batch, heads, keys):
            raise ValueError(
                f"a map of shape {shape} mixes values of shape ({batch}, {heads}, {keys}, width), "
                f"got {tuple(values.shape)}"
            )
        self._apply = apply
        self._apply_of = of_heads
        self._shape = shape
        self._of_every_head = math.prod(shape[:3])  # numbers that `apply` gives for one column
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
        """The map of these heads alone; it costs what that of all costs, but for channels as of Mamba's.

        >>> import torch
        >>> from regard.mixers import DeltaRule
        >>> DeltaRule(32, heads=4).map(torch.randn(1, 10, 32)).heads([0, 3]).shape
        (1, 2, 10, 10)
        """
        batch, heads, queries, keys = self.shape
        chosen = positions(index, heads, "heads", "heads").to(self.device)
        if len(chosen.unique()) < len(chosen):
            raise ValueError(f"the heads of a hidden map are chosen once each, got {index}")

        of_heads = self._apply_of
        shape = batch, len(chosen), queries, keys
        if of_heads is not None:
            return HiddenMap(of_heads(chosen), shape, self.values[:, chosen], lambda some: of_heads(chosen[some]))

        def apply(values: Tensor) -> Tensor:
            every = values.new_zeros(batch, heads, keys, values.shape[3]).index_copy(1, chosen, values)
            return self._apply(every)[:, chosen]

        view = HiddenMap(apply, shape, self.values[:, chosen])
        view._of_every_head = self._of_every_head
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

        def of_heads(some: Tensor) -> Apply:
            return self.heads(some.tolist()).rearranged(order, real)._apply

        values = moved(self.values, every).masked_fill(~columns, 0.0)
        return HiddenMap(apply, self.shape, values, None if self._apply_of is None else of_heads)

    # --- products -----------------------------------------------------------------------------------------------------

    def _product(self, values: Tensor) -> Tensor:
        return self._apply(values.to(self.device, self.dtype).expand(*self.shape[:2], -1, -1))

    def _transposed(self, weights: Tensor) -> Tensor:
        """The derivative of P V by V, which is what autograd computes."""
        batch, heads, _, keys = self.shape
        differentiable = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            values = torch.zeros(batch, heads, keys, weights.shape[3], device=self.device, dtype=self.dtype)
            product = self._apply(values.requires_grad_())
            weights = weights.to(product).expand_as(product)
            return torch.autograd.grad(product, values, weights, create_graph=differentiable)[0]

    @property
    def _numbers(self) -> int:
        return self._of_every_head

    @property
    def _by_columns(self) -> bool:
        return True  # a row is the derivative of a product, which costs about three
