"""The attention matrix that a linear mixer hides: an operator on values, never stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.maps import _columns
from regard.maps._columns import Segment, Segments
from regard.maps.attention_map import TopK, one_hot, sum_rows

_DENSE_LIMIT = 2**28


class HiddenMap:
    """``P`` of a mixer whose output is ``P V`` for values V, with the interface of `regard.AttentionMap`.

    P is known by what it does to values alone, so that one form fits every such mixer, whatever its recurrence. Its entries
    may be negative, and its rows need not sum to 1: there is no entropy, and no logsumexp.

    Args:
        apply: from values (B, H, M, W) to outputs (B, H, N, W), linear and differentiable.
        shape: (B, H, N, M).
        like: a tensor of the dtype and on the device of the values.

    >>> import torch
    >>> from regard.mixers.linear import linear_attention
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> P = HiddenMap(lambda v: linear_attention(q, k, v)[0], (1, 2, 50, 50), q)
    >>> bool(torch.allclose(P.dense(), (q @ k.mT).tril(), atol=1e-4))
    True
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], shape: tuple[int, int, int, int], like: Tensor) -> None:
        self._apply = apply
        self.shape = shape
        self.dtype, self.device = like.dtype, like.device

    def __repr__(self) -> str:
        return f"HiddenMap(shape={self.shape}, dtype={self.dtype})"

    def __matmul__(self, values: Tensor) -> Tensor:
        """``P V``: (B, H, N, W), from V (B|1, H|1, M, W)."""
        batch, heads, _, keys = self.shape
        if (
            values.ndim != 4
            or values.shape[0] not in (1, batch)
            or values.shape[1] not in (1, heads)
            or values.shape[2] != keys
        ):
            raise ValueError(
                f"A @ V needs V of shape ({batch} or 1, {heads} or 1, {keys}, width), got {tuple(values.shape)}"
            )
        return self._apply(values.to(self.device, self.dtype).expand(batch, heads, -1, -1))

    @property
    def T(self) -> TransposedHiddenMap:  # noqa: N802 - the field's name for it
        """The transposed operator: ``A.T @ W``."""
        return TransposedHiddenMap(self)

    def received(self, weights: Tensor | None = None) -> Tensor:
        """What each key receives, ``Σ_i w_i P_ij``: (B, H, M), from weights (B|1, H|1, N), ones by default."""
        if weights is None:
            weights = torch.ones(1, 1, self.shape[2], device=self.device)
        return (self.T @ weights[..., None]).squeeze(-1)

    def mass(self, segments: Segments) -> Tensor:
        """What each query gives to sets of keys: (B, H, N, S)."""
        batch, _, _, keys = self.shape
        return self @ _columns.indicator_columns(segments, keys, batch, self.device).to(self.dtype)

    def pool(self, n: int, m: int) -> Tensor:
        """The matrix summed over an n×m grid of blocks: (B, H, n, m)."""
        *_, queries, keys = self.shape
        if not (1 <= n <= queries and 1 <= m <= keys):
            raise ValueError(
                f"pool({n}, {m}) of a {queries}×{keys} matrix: blocks must number 1 to {queries} and 1 to {keys}"
            )
        blocks = [torch.arange(size, device=self.device) * number // size for size, number in ((queries, n), (keys, m))]
        return sum_rows(self @ one_hot(blocks[1], m, self.dtype), blocks[0], n)

    def rows(self, index: Segment) -> Tensor:
        """Whole rows of P: (B, H, len(index), M)."""
        chosen = _columns.positions(index, self.shape[2], "rows", "queries").to(self.device)
        return (self.T @ one_hot(chosen, self.shape[2], self.dtype).mT).mT

    def tile(self, rows: Segment, columns: Segment) -> Tensor:
        """A block of P: (B, H, len(rows), len(columns))."""
        chosen = _columns.positions(columns, self.shape[3], "columns", "keys").to(self.device)
        return self.rows(rows)[..., chosen]

    def at(self, targets: Tensor) -> Tensor:
        """Chosen entries ``P[i, targets[i]]``: (B, H, N), from targets (N,) or (B, N) long; −1 for none gives 0."""
        batch, heads, queries, _ = self.shape
        index = targets.to(self.device).reshape(-1, queries).expand(batch, queries)
        dense = self.dense()
        found = dense.gather(3, index.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, -1)).squeeze(-1)
        return found.masked_fill((index < 0)[:, None], 0.0)

    def topk(self, k: int) -> TopK:
        """The k largest entries of each row and their keys, (B, H, N, k) each."""
        return TopK(*self.dense().topk(k, dim=-1))

    def max(self) -> Tensor:
        """The largest entry of each row: (B, H, N)."""
        return self.topk(1).shares.squeeze(-1)

    def mean_distance(self, query_start: int = 0, key_start: int = 0) -> Tensor:
        """``Σ_j P_ij |i − j|``: (B, H, N), in tokens."""
        queries = torch.arange(self.shape[2], device=self.device) + query_start
        keys = torch.arange(self.shape[3], device=self.device) + key_start
        return (self.dense() * (queries[:, None] - keys).abs()).sum(-1)

    def dense(self, force: bool = False) -> Tensor:
        """The whole matrix (B, H, N, M); refused above 2²⁸ entries unless forced."""
        entries = torch.Size(self.shape).numel()
        if entries > _DENSE_LIMIT and not force:
            raise ValueError(
                f"a matrix of shape {self.shape} has {entries:,} entries; ask for products, rows or pool instead, "
                "or pass force=True"
            )
        return self @ torch.eye(self.shape[3], device=self.device, dtype=self.dtype)[None, None]


class TransposedHiddenMap:
    """``Pᵀ`` of a hidden map: the derivative of P V by V, which is what autograd computes."""

    def __init__(self, hidden: HiddenMap) -> None:
        self.T = hidden

    def __matmul__(self, weights: Tensor) -> Tensor:
        """``Pᵀ W``: (B, H, M, Dw), from W broadcastable to (B, H, N, Dw)."""
        batch, heads, _, keys = self.T.shape
        weights = weights.to(self.T.device, self.T.dtype).expand(batch, heads, -1, -1)
        values = torch.zeros(batch, heads, keys, weights.shape[3], device=self.T.device, dtype=self.T.dtype)
        with torch.enable_grad():
            received: Tensor = torch.func.vjp(self.T._apply, values)[1](weights)[0]
        return received
