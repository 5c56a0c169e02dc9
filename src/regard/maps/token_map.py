"""What every matrix that mixes tokens can be asked, however it is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from regard.maps._columns import Segment, Segments

_DENSE_LIMIT = 2**28
_QUESTIONS = ("entropy", "received", "mass", "product")


class TopK(NamedTuple):
    """The largest entries of each row, ``shares`` (B, H, N, k), and their keys, ``keys`` (long, −1 where none)."""

    shares: Tensor
    keys: Tensor


class TokenMap(ABC):
    """P, (B, H, N, M), by which each of N tokens mixes what M tokens hold: an operator that is never stored.

    `regard.AttentionMap` knows it by queries and keys, `regard.mixers.HiddenMap` by what it does to values.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the statistics."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the statistics are."""

    @property
    def T(self) -> TransposedMap:  # noqa: N802 - the field's name for it
        """The transposed operator: ``A.T @ W``."""
        return TransposedMap(self)

    @abstractmethod
    def heads(self, index: list[int]) -> TokenMap:
        """The map of these heads alone."""

    # --- products -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def __matmul__(self, values: Tensor) -> Tensor:
        """``P V``."""

    @abstractmethod
    def _transposed(self, weights: Tensor) -> Tensor:
        """``Pᵀ W``, from W (B, H, N, Dw)."""

    @abstractmethod
    def received(self, weights: Tensor | None = None) -> Tensor:
        """What each key receives, ``Σ_i w_i P_ij``: (B, H, M)."""

    @abstractmethod
    def mass(self, segments: Segments) -> Tensor:
        """What each query gives to sets of keys: (B, H, N, S)."""

    def pool(self, n: int, m: int) -> Tensor:
        """The matrix summed over an n×m grid of blocks: (B, H, n, m); token t of N falls into block ⌊t·n/N⌋."""
        *_, queries, keys = self.shape
        if not (1 <= n <= queries and 1 <= m <= keys):
            raise ValueError(
                f"pool({n}, {m}) of a {queries}×{keys} matrix: blocks must number 1 to {queries} and 1 to {keys}"
            )
        columns = one_hot(_blocks(keys, m, self.device), m, self.dtype)
        return sum_rows(self @ columns, _blocks(queries, n, self.device), n)

    def expect(self, question: str, *arguments: object) -> None:
        """Announce a question, so that one pass over the matrix answers all that were announced before the first answer.

        ``question`` is "entropy", "received", "mass" or "product"; the arguments are those of the method asked later (for
        "product" the right-hand side of ``A @ V``), the same objects. Where no pass can be shared, nothing comes of it.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> A.expect("entropy"); A.expect("received")
        >>> entropy, received = A.entropy(), A.received()  # one pass, not two
        """
        if question not in _QUESTIONS:
            raise ValueError(f"expect() knows {', '.join(_QUESTIONS)}; got {question!r}")
        self._expect(question, *arguments)

    @abstractmethod
    def _expect(self, question: str, *arguments: object) -> None:
        """The same, for a question that there is."""

    # --- entries ------------------------------------------------------------------------------------------------------

    def at(self, targets: Tensor) -> Tensor:
        """Chosen entries ``P[i, targets[i]]``: (B, H, N), from targets (N,) or (B, N) long; −1 for none gives 0.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> previous_token = regard.AttentionMap(q, k, is_causal=True).at(torch.arange(50) - 1)
        """
        batch, _, queries, keys = self.shape
        if targets.is_floating_point() or targets.shape not in ((queries,), (1, queries), (batch, queries)):
            raise ValueError(
                f"targets must be positions of shape ({queries},) or ({batch}, {queries}), "
                f"got {targets.dtype} {tuple(targets.shape)}"
            )
        targets = targets.to(self.device).reshape(-1, queries).expand(batch, queries)
        if bool((targets >= keys).any()) or bool((targets < -1).any()):
            raise IndexError(f"targets go from {int(targets.min())} to {int(targets.max())}; keys from 0 to {keys - 1}")
        return self._entries(targets)

    @abstractmethod
    def _entries(self, targets: Tensor) -> Tensor:
        """The same, from targets (B, N) that there are."""

    def rows(self, index: Segment) -> Tensor:
        """Whole rows of P: (B, H, len(index), M)."""
        return self.tile(index, slice(None))

    @abstractmethod
    def tile(self, rows: Segment, columns: Segment) -> Tensor:
        """A block of P: (B, H, len(rows), len(columns))."""

    def dense(self, force: bool = False) -> Tensor:
        """The whole matrix (B, H, N, M); refused above 2²⁸ entries (1 GiB in float32) unless forced."""
        entries = torch.Size(self.shape).numel()
        if entries > _DENSE_LIMIT and not force:
            size = entries * torch.finfo(self.dtype).bits / 8 / 2**30
            raise ValueError(
                f"a matrix of shape {self.shape} takes {size:.1f} GiB; ask for statistics, rows or pool instead, "
                "or pass force=True"
            )
        return self.tile(slice(None), slice(None))

    # --- orderings and distances --------------------------------------------------------------------------------------

    def topk(self, k: int) -> TopK:
        """The k largest entries of each row and their keys, (B, H, N, k) each; not differentiable.

        An entry of 0, as it is for a key that the row does not see, has key −1.
        """
        keys = self.shape[3]
        if not 1 <= k <= keys:
            raise ValueError(f"topk({k}) of {keys} keys: k must be from 1 to {keys}")
        return self._topk(k)

    @abstractmethod
    def _topk(self, k: int) -> TopK:
        """The same, of as many keys as there are."""

    def max(self) -> Tensor:
        """The largest entry of each row: (B, H, N); not differentiable."""
        return self.topk(1).shares.squeeze(-1)

    @abstractmethod
    def mean_distance(self, query_start: int = 0, key_start: int = 0) -> Tensor:
        """``Σ_j P_ij |i − j|``: (B, H, N), in tokens."""

    def _weight_column(self, weights: Tensor) -> Tensor:
        """Weights over queries as (B, H, N)."""
        batch, heads, queries, _ = self.shape
        sizes = tuple(weights.shape)
        if len(sizes) != 3 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2] != queries:
            raise ValueError(f"received() needs weights of shape ({batch} or 1, {heads} or 1, {queries}), got {sizes}")
        return weights.to(self.device, self.dtype).expand(batch, heads, queries)


class TransposedMap:
    """``Pᵀ`` of a map: ``A.T @ W`` is (B, H, M, Dw), in W's dtype, from W broadcastable to (B, H, N, Dw).

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 2, 50, 16)
    >>> A = regard.AttentionMap(q, k)
    >>> (A.T @ torch.ones(1, 1, 50, 3)).shape
    torch.Size([1, 2, 50, 3])
    """

    def __init__(self, attention: TokenMap) -> None:
        self.T = attention

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, M, N)."""
        batch, heads, queries, keys = self.T.shape
        return batch, heads, keys, queries

    def __matmul__(self, weights: Tensor) -> Tensor:
        """``Pᵀ W``."""
        batch, heads, queries, _ = self.T.shape
        wanted = (batch, heads, queries)
        if weights.ndim != 4 or any(size not in (1, full) for size, full in zip(weights.shape, wanted, strict=False)):
            raise ValueError(f"A.T @ W needs W broadcastable to {(*wanted, 'width')}, got {tuple(weights.shape)}")
        return self.T._transposed(weights.expand(*wanted, -1)).to(weights.dtype)


def one_hot(blocks: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Columns that sum the keys of each block, (1, 1, M, number), from the block of each key."""
    return torch.nn.functional.one_hot(blocks, number).to(dtype)[None, None]


def sum_rows(product: Tensor, blocks: Tensor, number: int) -> Tensor:
    """The rows (B, H, N, W) of a product summed by block of query: (B, H, number, W)."""
    batch, heads, _, width = product.shape
    return product.new_zeros(batch, heads, number, width).index_add(2, blocks, product)


def _blocks(length: int, number: int, device: torch.device) -> Tensor:
    """The block, of ``number`` nearly equal ones, that each of ``length`` tokens falls into."""
    return torch.arange(length, device=device) * number // length
