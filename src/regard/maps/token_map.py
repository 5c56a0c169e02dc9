"""What every matrix that mixes tokens can be asked, however it is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard import maps
from regard.maps._columns import Segment, Segments, indicator_columns, positions
from regard.maps._precision import in_own_precision

# Composed maps are built on this module and made by it, so they are looked up in `maps` when they are asked for.

_DENSE_LIMIT = 2**28
_NUMBERS_AT_ONCE = 2**22
_QUESTIONS = ("entropy", "received", "mass", "product", "block_sums", "mean_distance")
_ROUNDING = 1e-5  # by which rows of probabilities may miss a sum of 1, since factors are rounded too


class TopK(NamedTuple):
    """The largest entries of each row, ``shares`` (B, H, N, k), and their keys, ``keys`` (long, −1 where none)."""

    shares: Tensor
    keys: Tensor


class TokenMap(ABC):
    """P, (B, H, N, M), by which each of N tokens mixes what M tokens hold: an operator that is never stored.

    `regard.AttentionMap` knows it by queries and keys, `regard.mixers.HiddenMap` by what it does to values. Maps are
    composed as matrices are, and what they are composed to is a map again, which answers from its parts in their memory:

    - ``A + B``, ``A - B``, ``-A``; ``A * f`` with a number or with factors of heads, (H,) or (B|1, H);
    - ``A.scale_rows(f)`` and ``A.scale_keys(f)``: factors of each query or each key, ``diag(f) P`` and ``P diag(f)``;
    - ``A @ B``, the product of matrices (B, H, N, K) and (B, H, K, M); ``A.residual(f)``, which is ``f P + (1 − f) I``;
    - ``A.mix_heads(weights)`` and ``A.mean_heads()``; ``A.heads(index)``; `regard.maps.ConcatenatedHeads`;
    - ``A.T``, and ``A.restrict(rows, keys)``.

    Every map has products, received, mass, pool, at, rows, tile, dense, topk, max and mean_distance. Entropy is of maps
    with `has_probability_rows`, logsumexp and viewers of those with `has_logits`; others refuse with a NotImplementedError.
    Products, received, mass, pool, at, rows and tile carry gradients wherever the parts do; topk, max, mean_distance and
    the entropy of a composed map do not.

    A further operator defines its shape, dtype and device, `heads`, and the two products `_product` and `_transposed`;
    what else it defines saves time.

    >>> import torch, regard
    >>> q, k = torch.randn(2, 1, 4, 50, 16)
    >>> A = regard.AttentionMap(q[:, :2], k[:, :2], is_causal=True)
    >>> B = regard.AttentionMap(q[:, 2:], k[:, 2:], is_causal=True)
    >>> differential = A - 0.8 * B
    >>> differential.received().shape
    torch.Size([1, 2, 50])
    >>> rollout = A.mean_heads().residual(0.5) @ B.mean_heads().residual(0.5)
    >>> rollout.has_probability_rows, bool(torch.allclose(rollout.rows([49]).sum(), torch.tensor(1.0)))
    (True, True)
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

    @abstractmethod
    def heads(self, index: list[int]) -> TokenMap:
        """The map of these heads alone."""

    @abstractmethod
    def _product(self, values: Tensor) -> Tensor:
        """``P V`` in the map's precision, from V (B|1, H|1, M, W) of any dtype."""

    @abstractmethod
    def _transposed(self, weights: Tensor) -> Tensor:
        """``Pᵀ W`` in the map's precision, from W (B|1, H|1, N, W) of any dtype."""

    # --- what it can --------------------------------------------------------------------------------------------------

    @property
    def has_probability_rows(self) -> bool:
        """Whether no entry is negative and rows sum to 1, less what falls to no key: then it has an entropy.

        What falls to no key is all of a row that sees none, and what sinks take of a row.
        """
        totals = self._row_totals
        return totals is not None and bool(((totals - 1).abs() <= _ROUNDING).all())

    @property
    def has_logits(self) -> bool:
        """Whether each row is one softmax of known logits: then it has a logsumexp and viewers."""
        return False

    @property
    def _row_totals(self) -> Tensor | None:
        """What rows sum to, (B|1, H|1, N|1), with what falls to no key, where no entry can be negative; else None."""
        return None

    def _lacks(self, question: str, reason: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self!r} has no {question}: {reason}. It has products, received, mass, pool, at, rows, topk, max and "
            "mean_distance"
        )

    # --- composition --------------------------------------------------------------------------------------------------

    @property
    def T(self) -> TokenMap:  # noqa: N802 - the field's name for it
        """The transposed matrix ``Pᵀ``, (B, H, M, N)."""
        return maps.Transposed(self)

    def __add__(self, other: TokenMap) -> TokenMap:
        return maps.Sum(self, other) if isinstance(other, TokenMap) else NotImplemented

    def __sub__(self, other: TokenMap) -> TokenMap:
        return maps.Sum(self, -other) if isinstance(other, TokenMap) else NotImplemented

    def __neg__(self) -> TokenMap:
        return self * -1.0

    def __mul__(self, factor: float | Tensor) -> TokenMap:
        """``f P``, from a number or from factors of heads, (H,) or (B|1, H)."""
        if isinstance(factor, TokenMap):
            raise TypeError("A * B of two maps is not linear in either; A @ B is the product of the matrices")
        return maps.Scaled(self, _head_factors(factor, self.shape, self.dtype))

    __rmul__ = __mul__

    def scale_rows(self, factors: Tensor) -> TokenMap:
        """``diag(f) P``, with a factor for each query: (N,) or (B|1, H|1, N)."""
        return maps.Scaled(self, _token_factors(factors, self.shape, "scale_rows"))

    def scale_keys(self, factors: Tensor) -> TokenMap:
        """``P diag(f)``, with a factor for each key: (M,) or (B|1, H|1, M)."""
        return maps.Scaled(self.T, _token_factors(factors, self.T.shape, "scale_keys")).T

    def residual(self, alpha: float | Tensor) -> TokenMap:
        """``α P + (1 − α) I``, for a number or factors of heads: a layer and the residual stream beside it.

        S. Abnar and W. Zuidema (2020), Quantifying Attention Flow in Transformers, multiply these over layers, α = 1/2.
        """
        batch, heads, queries, keys = self.shape
        if queries != keys:
            raise ValueError(f"residual() needs as many queries as keys, got a map of shape {self.shape}")
        identity = maps.Identity(batch, heads, queries, self.dtype, self.device)
        return self * alpha + identity * (1.0 - alpha)

    def mix_heads(self, weights: Tensor) -> TokenMap:
        """``P'_o = Σ_h w_oh P_h``, from weights (H_out, H) or (B|1, H_out, H).

        N. Shazeer et al. (2020), Talking-Heads Attention, mix heads so after the softmax.
        """
        return maps.MixedHeads(self, weights)

    def mean_heads(self) -> TokenMap:
        """The mean over heads: (B, 1, N, M)."""
        heads = self.shape[1]
        return self.mix_heads(torch.full((1, heads), 1 / heads, dtype=self.dtype, device=self.device))

    def restrict(self, rows: Segment | None = None, keys: Segment | None = None) -> TokenMap:
        """The map of these rows and these keys alone, in this order; not normalised again.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> A.restrict(slice(10, 20), [0, 1, 2]).shape
        (1, 2, 10, 3)
        """
        *_, queries, every = self.shape
        return self._restricted(
            None if rows is None else _unless_all(self._positions(rows, queries, "rows", "queries"), queries),
            None if keys is None else _unless_all(self._positions(keys, every, "keys", "keys"), every),
        )

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        """The map of these rows and keys alone, given as positions; None for all."""
        return self if rows is None and keys is None else maps.Restricted(self, rows, keys)

    def _positions(self, index: Segment, length: int, what: str, unit: str) -> Tensor:
        return positions(index, length, what, unit).to(self.device)

    # --- products -----------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, other: TokenMap) -> TokenMap: ...

    @in_own_precision
    def __matmul__(self, other: Tensor | TokenMap) -> Tensor | TokenMap:
        """``P V``: (B, H, N, W), in V's dtype, from V (B|1, H|1, M, W); or the product of two maps.

        A map of one batch, or of one head, takes V with any number of them.
        """
        if isinstance(other, TokenMap):
            return maps.Product(self, other)
        self._check_values(other)
        batch, heads = (wide if own == 1 else 1 for wide, own in zip(other.shape[:2], self.shape[:2], strict=True))
        if batch * heads == 1:
            return self._product(other).to(other.dtype)
        # What the map has one of is moved into the width, so that the matrix is evaluated once.
        kept_batch, kept_heads, keys, width = other.shape[0] // batch, other.shape[1] // heads, *other.shape[2:]
        apart = other.reshape(kept_batch, batch, kept_heads, heads, keys, width)
        product: Tensor = self._product(apart.permute(0, 2, 4, 1, 3, 5).flatten(3))
        apart = product.reshape(*product.shape[:3], batch, heads, width).permute(0, 3, 1, 4, 2, 5)
        return apart.flatten(2, 3).flatten(0, 1).to(other.dtype)

    @property
    def _value_heads(self) -> tuple[int, ...]:
        """Numbers of heads, beside 1, that values may have."""
        return (self.shape[1],)

    def _check_values(self, values: Tensor) -> None:
        batch, _, _, keys = self.shape
        heads = self._value_heads
        sizes = tuple(values.shape)
        fits = len(sizes) == 4 and sizes[2] == keys
        if not fits or (sizes[0] not in (1, batch) and batch > 1) or (sizes[1] not in (1, *heads) and max(heads) > 1):
            batches = "any batch" if batch == 1 else f"{batch} or 1"
            wanted = "any heads" if max(heads) == 1 else " or ".join(map(str, (*heads, 1)))
            raise ValueError(f"A @ V needs V of shape ({batches}, {wanted}, {keys}, width), got {sizes}")

    @in_own_precision
    def received(self, weights: Tensor | None = None) -> Tensor:
        """What each key receives, ``Σ_i w_i P_ij``: (B, H, M), from weights (B|1, H|1, N), ones by default."""
        return self._received(weights)

    def _received(self, weights: Tensor | None) -> Tensor:
        batch, heads, queries, keys = self.shape
        if weights is None:
            weights = torch.ones(1, 1, queries, dtype=self.dtype, device=self.device)
        column = self._weight_column(weights)[..., None]
        return self._transposed(column).squeeze(-1).to(self.dtype).expand(batch, heads, keys)

    @in_own_precision
    def mass(self, segments: Segments) -> Tensor:
        """What each query gives to sets of keys: (B, H, N, S).

        A segment is a position, several, a slice, or a boolean mask (M,) or (B, M).
        """
        return self._mass(segments)

    def _mass(self, segments: Segments) -> Tensor:
        batch, _, _, keys = self.shape
        columns = indicator_columns(segments, keys, batch, self.device)
        return self._product(columns.to(self.dtype)).to(self.dtype)

    @in_own_precision
    def pool(self, n: int, m: int, rows: Segment | None = None, columns: Segment | None = None) -> Tensor:
        """The matrix summed over an n×m grid of blocks: (B, H, n, m); token t of N falls into block ⌊t·n/N⌋.

        With rows or columns the same of that part of the matrix: a few rows of a long text cost little.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> A.pool(4, 4, rows=slice(30, 50), columns=slice(0, 10)).shape
        torch.Size([1, 2, 4, 4])
        """
        part = self if rows is None else self.restrict(rows)
        *_, queries, every = part.shape
        keys = self._positions(slice(None) if columns is None else columns, every, "columns", "keys")
        if not (1 <= n <= queries and 1 <= m <= len(keys)):
            raise ValueError(
                f"pool({n}, {m}) of a {queries}×{len(keys)} matrix: blocks must number 1 to {queries} and 1 to {len(keys)}"
            )
        sums = torch.zeros(every, m, dtype=self.dtype, device=self.device)
        one = sums.new_ones(())
        sums.index_put_((keys, _blocks(len(keys), m, self.device)), one, accumulate=True)
        return sum_rows(part @ sums[None, None], _blocks(queries, n, self.device), n)

    @in_own_precision
    def block_sums(self, of_queries: Tensor, of_keys: Tensor, weights: Tensor | None = None) -> Tensor:
        """``Σ_i,j w_i P_ij`` over the queries and the keys of each pair of blocks: (B, H, rows, columns) of blocks.

        Args:
            of_queries: (N,) the block of each query, never less than that of the query before.
            of_keys: (M,) the block of each key.
            weights: (B|1, H|1, N) over queries, ones by default.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> of_ten = torch.arange(50) // 10
        >>> A.block_sums(of_ten, of_ten).shape
        torch.Size([1, 2, 5, 5])
        """
        self._check_blocks(of_queries, of_keys)
        return self._block_sums(of_queries.to(self.device), of_keys.to(self.device), weights)

    def _block_sums(self, of_queries: Tensor, of_keys: Tensor, weights: Tensor | None) -> Tensor:
        product = self @ one_hot(of_keys, int(of_keys[-1]) + 1, self.dtype)
        if weights is not None:
            product = product * self._weight_column(weights)[..., None]
        return sum_rows(product, of_queries, int(of_queries[-1]) + 1)

    def _check_blocks(self, of_queries: Tensor, of_keys: Tensor) -> None:
        for blocks, length, what in ((of_queries, self.shape[2], "queries"), (of_keys, self.shape[3], "keys")):
            sizes = tuple(blocks.shape)
            if blocks.is_floating_point() or sizes != (length,):
                raise ValueError(
                    f"block_sums() needs a block of each of {length} {what}, got {blocks.dtype} of shape {sizes}"
                )
            if length and (bool((blocks.diff() < 0).any()) or int(blocks[0]) < 0):
                raise ValueError(
                    f"block_sums() needs the blocks of {what} in order, from 0 on: each as the one before or more"
                )

    def expect(self, question: str, *arguments: object) -> None:
        """Announce a question, so that one pass over the matrix answers all that were announced before the first answer.

        ``question`` is "entropy", "received", "mass", "product", "block_sums" or "mean_distance"; the arguments are those of
        the method asked later (for "product" the right-hand side of ``A @ V``), the same objects. Where no pass can be
        shared, nothing comes of it.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> A.expect("entropy"); A.expect("received")
        >>> entropy, received = A.entropy(), A.received()  # one pass, not two
        """
        if question not in _QUESTIONS:
            raise ValueError(f"expect() knows {', '.join(_QUESTIONS)}; got {question!r}")
        if question == "entropy":
            self._check_probability_rows()
        if question == "product" and isinstance(arguments[0], Tensor):
            self._check_values(arguments[0])
            if any(wide > 1 == own for wide, own in zip(arguments[0].shape[:2], self.shape[:2], strict=True)):
                return  # these values are brought to another form when the product is asked
        self._expect(question, *arguments)

    def tell_progress(self, tell: Callable[[float], None]) -> None:  # noqa: B027 - most have nothing to tell
        """Have a long pass over the matrix tell which share of it is done, from 0 to 1, where it goes piece by piece."""

    def _expect(self, question: str, *arguments: object) -> None:
        """Announce a question that the map can answer; by default nothing is shared."""
        return

    # --- entries ------------------------------------------------------------------------------------------------------

    @in_own_precision
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
        targets = targets.to(self.device).expand(batch, queries)
        if bool((targets >= keys).any()) or bool((targets < -1).any()):
            raise IndexError(f"targets go from {int(targets.min())} to {int(targets.max())}; keys from 0 to {keys - 1}")
        return self._entries(targets)

    def _entries(self, targets: Tensor) -> Tensor:
        """``P[i, targets[i]]`` from targets (B, N) that there are."""

        def pick(rows: slice, columns: slice) -> Tensor:
            entries = self._read(rows, columns)
            place = targets[:, rows] - columns.start
            here = ((place >= 0) & (place < entries.shape[3]))[:, None]
            place = place.clamp(0, entries.shape[3] - 1)[:, None, :, None].expand(-1, entries.shape[1], -1, -1)
            return entries.gather(3, place).squeeze(3).masked_fill(~here, 0.0)

        found, differentiable = self._new(*self.shape[:3]), False
        for strip in self._strips():
            # Strips that a gradient goes through are computed again for it: all of them together are the matrix.
            picked = checkpoint(pick, *strip, use_reentrant=False) if differentiable else pick(*strip)
            differentiable = picked.requires_grad
            found[:, :, strip[0]] += picked
        return found

    @in_own_precision
    def diagonals(self, offsets: Sequence[int]) -> Tensor:
        """The entries ``P[i, i + offset]``: (B, H, N, len(offsets)); 0 where there is no such key.

        >>> import torch, regard
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = regard.AttentionMap(q, k, is_causal=True)
        >>> A.diagonals([-2, -1, 0]).shape
        torch.Size([1, 2, 50, 3])
        """
        return self._diagonals([int(offset) for offset in offsets])

    def _diagonals(self, offsets: list[int]) -> Tensor:
        *_, queries, keys = self.shape
        every = torch.arange(queries, device=self.device)
        found = [self.at(_within(every + offset, keys)) for offset in offsets]
        return torch.stack(found, dim=-1) if found else self._new(*self.shape[:3], 0)

    def rows(self, index: Segment) -> Tensor:
        """Whole rows of P: (B, H, len(index), M)."""
        return self.tile(index, slice(None))

    @in_own_precision
    def tile(self, rows: Segment, columns: Segment) -> Tensor:
        """A block of P: (B, H, len(rows), len(columns)), read by its rows or its columns, whichever are fewer."""
        *_, queries, keys = self.shape
        across = self._positions(rows, queries, "rows", "queries")
        down = self._positions(columns, keys, "columns", "keys")
        if len(across) <= len(down):
            parts = [self._some_rows(some)[..., down] for some in across.split(self._at_once)]
            return torch.cat(parts, dim=2)
        part = self._restricted(_unless_all(across, queries), None)
        return torch.cat([part._some_columns(some) for some in down.split(self._at_once)], dim=3)

    def dense(self, force: bool = False) -> Tensor:
        """The whole matrix (B, H, N, M); refused above 2²⁸ entries (1 GiB in float32) unless forced."""
        entries = torch.Size(self.shape).numel()
        if entries > _DENSE_LIMIT and not force:
            size = entries * torch.finfo(self.dtype).bits / 8 / 2**30
            raise ValueError(
                f"a matrix of shape {self.shape} takes {size:.1f} GiB; ask for statistics, rows or pool instead, "
                "or pass force=True"
            )
        return self.tile(slice(None), slice(None)) if entries else self._new(*self.shape)

    def _some_rows(self, index: Tensor) -> Tensor:
        """(B, H, len(index), M), as many as may be held at once."""
        return self._transposed(one_hot(index, self.shape[2], self.dtype).mT).mT.to(self.dtype)

    def _some_columns(self, index: Tensor) -> Tensor:
        """(B, H, N, len(index)), as many as may be held at once."""
        return self._product(one_hot(index, self.shape[3], self.dtype).mT).to(self.dtype)

    @property
    def _numbers(self) -> int:
        """How many numbers are made for one row or column."""
        batch, heads, queries, keys = self.shape
        return max(1, batch * heads * max(queries, keys))

    @property
    def _at_once(self) -> int:
        """Rows, or columns, that are computed together."""
        return max(1, _NUMBERS_AT_ONCE // self._numbers)

    @property
    def _by_columns(self) -> bool:
        """Whether the whole matrix is read sooner by its columns than by its rows."""
        return False

    def _strips(self) -> Iterator[tuple[slice, slice]]:
        """The rows and columns of strips that make up the whole matrix, of some complete rows or columns each."""
        *_, queries, keys = self.shape
        length = keys if self._by_columns else queries
        for start in range(0, length, self._at_once):
            some = slice(start, min(start + self._at_once, length))
            yield (slice(0, queries), some) if self._by_columns else (some, slice(0, keys))

    def _read(self, rows: slice, columns: slice) -> Tensor:
        """The entries of a strip, (B, H, rows, columns)."""
        some, read = (columns, self._some_columns) if self._by_columns else (rows, self._some_rows)
        return read(torch.arange(some.start, some.stop, device=self.device))

    def _new(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # --- orderings and distances --------------------------------------------------------------------------------------

    @in_own_precision
    def topk(self, k: int) -> TopK:
        """The k largest entries of each row and their keys, (B, H, N, k) each; not differentiable.

        An entry of 0, as it is for a key that the row does not see, has key −1.
        """
        keys = self.shape[3]
        if not 1 <= k <= keys:
            raise ValueError(f"topk({k}) of {keys} keys: k must be from 1 to {keys}")
        if 0 in self.shape:
            empty = self._new(*self.shape[:3], k)
            return TopK(empty, empty.long())
        return self._topk(k)

    @torch.no_grad()
    def _topk(self, k: int) -> TopK:
        """The k largest shares of each row, of at most as many keys as there are."""
        shares = self._new(*self.shape[:3], k).fill_(-math.inf)
        keys = torch.full(shares.shape, -1, device=self.device)
        every = torch.arange(self.shape[3], device=self.device)
        for rows, columns in self._strips():
            entries = self._read(rows, columns)
            both = torch.cat([shares[:, :, rows], entries], dim=3)
            names = torch.cat([keys[:, :, rows], every[columns].expand_as(entries)], dim=3)
            shares[:, :, rows], best = both.topk(k, dim=3)
            keys[:, :, rows] = names.gather(3, best)
        return TopK(shares, keys.masked_fill(shares == 0, -1))

    def max(self) -> Tensor:
        """The largest entry of each row: (B, H, N); not differentiable."""
        return self.topk(1).shares.squeeze(-1)

    @in_own_precision
    def mean_distance(self, query_start: int = 0, key_start: int = 0) -> Tensor:
        """``Σ_j P_ij |i − j|``: (B, H, N), in tokens; not differentiable.

        ``query_start`` and ``key_start`` are the positions of the first query and the first key in their text, for calls
        that see a part of it (a decode step has one query, at its end).
        """
        if 0 in self.shape:
            return self._new(*self.shape[:3])
        return self._mean_distance(query_start - key_start)

    @torch.no_grad()
    def _mean_distance(self, start: int) -> Tensor:
        """``Σ_j P_ij |start + i − j|``, where the first query stands so many tokens after the first key."""
        total = self._new(*self.shape[:3])
        for rows, columns in self._strips():
            distance = distances(rows, torch.arange(columns.start, columns.stop, device=self.device), start)
            total[:, :, rows] += (self._read(rows, columns) * distance).sum(dim=3)
        return total

    # --- what only some have an answer to -----------------------------------------------------------------------------

    @in_own_precision
    def entropy(self) -> Tensor:
        """``H_i = −Σ_j P_ij log P_ij``: (B, H, N), in nats, where the map `has_probability_rows`.

        Of a composed map it costs the whole matrix, some rows at a time, and is not differentiable.
        """
        self._check_probability_rows()
        return self._entropy()

    @torch.no_grad()
    def _entropy(self) -> Tensor:
        total = self._new(*self.shape[:3])
        for rows, columns in self._strips():
            total[:, :, rows] += torch.special.entr(self._read(rows, columns).clamp(min=0)).sum(dim=3)
        return total

    def _check_probability_rows(self) -> None:
        if not self.has_probability_rows:
            raise self._lacks("entropy", "its rows are no probabilities: they need not sum to 1, or may be negative")

    def logsumexp(self) -> Tensor:
        """``L_i = log Σ_j exp s_ij``: (B, H, N), natural logarithm, where the map `has_logits`."""
        raise self._lacks("logsumexp", "its entries are not made of logits by a softmax")

    def viewers(self, weights: Tensor | None = None) -> Tensor:
        """The number of queries that may see each key, or the sum of their weights, where the map `has_logits`."""
        raise self._lacks("viewers", "which keys a query could see is not known")

    def _weight_column(self, weights: Tensor) -> Tensor:
        """Weights over queries as (B, H, N)."""
        batch, heads, queries, _ = self.shape
        sizes = tuple(weights.shape)
        if len(sizes) != 3 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2] != queries:
            raise ValueError(f"received() needs weights of shape ({batch} or 1, {heads} or 1, {queries}), got {sizes}")
        return weights.to(self.device, self.dtype).expand(batch, heads, queries)


def one_hot(blocks: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Columns that sum the keys of each block, (1, 1, M, number), from the block of each key."""
    return torch.nn.functional.one_hot(blocks, number).to(dtype)[None, None]


def sum_rows(product: Tensor, blocks: Tensor, number: int) -> Tensor:
    """The rows (B, H, N, W) of a product summed by block of query: (B, H, number, W)."""
    batch, heads, _, width = product.shape
    return product.new_zeros(batch, heads, number, width).index_add(2, blocks, product)


def distances(rows: slice, keys: Tensor, start: int) -> Tensor:
    """``|start + i − j|`` of some queries and the positions of some keys, (queries, keys)."""
    queries = torch.arange(rows.start, rows.stop, device=keys.device) + start
    return (queries[:, None] - keys).abs()


def _within(targets: Tensor, keys: int) -> Tensor:
    """The targets, −1 for those that are no key."""
    return targets.masked_fill((targets < 0) | (targets >= keys), -1)


def _unless_all(index: Tensor, length: int) -> Tensor | None:
    """Some positions of so many; None where they are all of them in their order."""
    return None if torch.equal(index, torch.arange(length, device=index.device)) else index


def _blocks(length: int, number: int, device: torch.device) -> Tensor:
    """The block, of ``number`` nearly equal ones, that each of ``length`` tokens falls into."""
    return torch.arange(length, device=device) * number // length


def _head_factors(factor: float | Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """A number, or factors (H,) or (B|1, H), as (B|1, H|1, 1)."""
    factors = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=dtype)
    if factors.ndim == 0:
        return factors.view(1, 1, 1)
    batch, heads, *_ = shape
    if factors.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"A * f needs a number or factors of heads, ({heads},) or ({batch} or 1, {heads}), got {tuple(factors.shape)}; "
            "scale_rows() and scale_keys() take factors of tokens"
        )
    return factors.reshape(-1, heads, 1)


def _token_factors(factors: Tensor, shape: tuple[int, int, int, int], question: str) -> Tensor:
    """Factors (N,) or (B|1, H|1, N) as the latter."""
    batch, heads, tokens, _ = shape
    sizes = tuple(factors.shape)
    if sizes != (tokens,) and (
        len(sizes) != 3 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads) or sizes[2] != tokens
    ):
        raise ValueError(
            f"{question}() needs factors of shape ({tokens},) or ({batch} or 1, {heads} or 1, {tokens}), got {sizes}"
        )
    return factors.reshape((1,) * (3 - len(sizes)) + sizes)
