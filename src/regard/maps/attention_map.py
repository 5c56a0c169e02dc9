"""The attention matrix of one call as a linear operator that is never stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from regard.maps import _blocked, _columns, _dense, _tiled
from regard.maps._columns import Segments
from regard.maps._pass import Pass, Question
from regard.maps._precision import in_own_precision, refuse_forward_mode
from regard.maps._request import Blocks
from regard.maps._scores import Scores, make_scores
from regard.maps._select import KernelName, check_kernel
from regard.maps.restricted import Restricted
from regard.maps.token_map import TokenMap, TopK, distances, one_hot
from regard.masks import Mask, causal

_ENTRIES_AT_ONCE = 2**24


class AttentionMap(TokenMap):
    """``P = softmax(scale · Q Kᵀ + mask)`` of one attention call, as an operator that is never stored.

    Semantics are those of ``torch.nn.functional.scaled_dot_product_attention``. A row that may see no key is all zeros,
    with log-sum-exp −inf and entropy 0. Statistics come in float32 (float64 for float64 inputs); logits too large for
    float32 to tell their probabilities apart are evaluated in float64. ``@``, ``.T @``, `logsumexp`, `entropy`,
    `received`, `mass`, `pool`, `at`, `rows` and `tile` are differentiable in query, key, an additive mask, sinks and what
    they multiply. `topk`, `max` and `mean_distance` are not, and say so in their result, which never requires a gradient.

    Args:
        query: (B, Hq, N, D), of float16, bfloat16, float32 or float64.
        key: (B, Hk, M, D); with ``enable_gqa`` Hk may be a divisor of Hq.
        attn_mask: boolean (True: visible) or additive, broadcastable to (B, Hq, N, M).
        is_causal: query i sees the keys j ≤ i.
        scale: factor of the logits; 1/√D by default.
        enable_gqa: let neighbouring query heads share a key head.
        softcap: c makes ``c · tanh(s / c)`` of each logit s before the mask, as Gemma 2 does; no cap by default.
        sinks: (Hq,), (B, Hq) or (B|1, Hq|1, N|1), one more logit in each row's softmax whose probability goes to no key,
            as in gpt-oss; rows then sum to less than 1, and the log-sum-exp counts it.
        kernel: "auto", or one of "fused" (PyTorch's operators), "tiled" (any device), "blocked" (the visible tiles of a mask)
            and "dense" (the float64 reference).
        mask: a rule of `regard.masks`, which hides pairs besides; only tiles with a visible pair are visited.

    Raises:
        ValueError, TypeError: inputs that SDPA would refuse, no heads or no head_dim, and NaN or infinity in query or key.
        NotImplementedError: a tangent of forward-mode differentiation in what it is made of or multiplied with.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 4, 1000, 32)
        >>> A = AttentionMap(q, k, is_causal=True)
        >>> A.shape
        (1, 4, 1000, 1000)
        >>> (A @ v).shape, A.entropy().shape, A.received().shape
        (torch.Size([1, 4, 1000, 32]), torch.Size([1, 4, 1000]), torch.Size([1, 4, 1000]))
        >>> bool(torch.allclose(A.received().sum(-1), torch.tensor(1000.0)))
        True
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        kernel: KernelName = "auto",
        mask: Mask | None = None,
    ) -> None:
        check_kernel(kernel, mask is not None)
        refuse_forward_mode(query, key, attn_mask)
        scores = make_scores(query, key, attn_mask, is_causal, scale, enable_gqa, softcap, sinks, mask)
        self._bind(scores, kernel)
        _ = self._scores.limit  # refuses NaN and infinity here, where the caller can see what it passed

    def _bind(self, scores: Scores, kernel: KernelName) -> None:
        self._scores = scores
        self._pass = Pass(scores, kernel)

    @classmethod
    def _of(cls, scores: Scores, kernel: KernelName) -> AttentionMap:
        """The map of logits that were checked before."""
        attention = cls.__new__(cls)
        attention._bind(scores, kernel)
        return attention

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, N, M)."""
        return self._scores.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return torch.promote_types(self._scores.query.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self._scores.query.device

    def __repr__(self) -> str:
        return f"AttentionMap(shape={self.shape}, dtype={self._scores.query.dtype}, kernel={self._pass.kernel!r})"

    def heads(self, index: list[int]) -> AttentionMap:
        """The map of these query heads alone.

        >>> import torch
        >>> q, k = torch.randn(2, 1, 8, 10, 16)
        >>> AttentionMap(q, k).heads([0, 5]).shape
        (1, 2, 10, 10)
        """
        chosen = _columns.positions(index, self.shape[1], "heads", "heads").tolist()
        return self._of(self._scores.heads(chosen), self._pass.kernel)

    def with_columns(
        self, query: Tensor, key: Tensor, scale: float, added: float, blind: Tensor | None = None
    ) -> AttentionMap:
        """The map of this call with columns beside its queries and keys: terms of the logits, or what hides keys.

        Args:
            query: (B, Hq, N, D + columns).
            key: (B, Hk, M, D + columns).
            scale: factor of the logits.
            added: the largest sum of terms, but for those that hide: beside those, the precision need not rise.
            blind: (B, Hq, N), true for queries whose every key is hidden by columns; their rows are zero.

        Raises:
            ValueError: for a call with a soft cap.
        """
        if self._scores.softcap is not None:
            raise ValueError("terms of the logits cannot ride in columns beside a soft cap, which would cap them too")
        mask = self._scores.mask
        if blind is not None and bool(blind.any()):
            sees = ~blind[..., None]
            if mask is None or mask.dtype == torch.bool:
                mask = sees if mask is None else mask & sees
            else:
                mask = torch.where(sees, mask, -torch.inf)
        limit = self._scores.limit + added
        scores = replace(self._scores, query=query, key=key, mask=mask, scale=scale, bound=limit)
        return self._of(scores, self._pass.kernel)

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        """Queries may be left out; keys may not, since rows are normalised over all of them."""
        part = self if rows is None else self._rows_alone(rows)
        return part if keys is None else Restricted(part, None, keys)

    def _rows_alone(self, rows: Tensor) -> TokenMap:
        scores, keys = self._scores, self.shape[3]
        first = int(rows[0])
        neighbours = bool((rows.diff() == 1).all())
        parts = [t if t is None or t.shape[2] == 1 else t[:, :, rows] for t in (scores.mask, scores.sinks)]
        chosen = replace(
            scores, query=scores.query[:, :, rows], mask=parts[0], sinks=parts[1], bound=scores.limit, is_causal=False
        )
        rule = causal() if scores.is_causal else scores.rule
        if rule is None:
            return self._of(chosen, self._pass.kernel)
        if scores.is_causal and neighbours and first == 0:
            return self._of(replace(chosen, is_causal=True), self._pass.kernel)
        if neighbours:
            kernel: KernelName = "dense" if self._pass.kernel == "dense" else "auto"
            return self._of(replace(chosen, rule=rule.offset(query_start=first)), kernel)
        if scores.rule is not None or len(rows) * keys > _ENTRIES_AT_ONCE:
            return Restricted(self, rows, None)
        visible = torch.arange(keys, device=self.device) <= rows[:, None]
        return self._of(replace(chosen, mask=visible[None, None]), self._pass.kernel)

    @property
    def has_logits(self) -> bool:
        """True: its logits are those of queries and keys."""
        return True

    @property
    def has_probability_rows(self) -> bool:
        """Always: what a sink takes falls to no key."""
        return True

    @property
    def _row_totals(self) -> Tensor:
        return torch.ones(1, 1, 1, dtype=self.dtype, device=self.device)

    # --- products -----------------------------------------------------------------------------------------------------

    @property
    def _value_heads(self) -> tuple[int, ...]:
        heads, key_heads = self.shape[1], self._scores.key.shape[1]
        return (heads,) if heads == key_heads else (key_heads, heads)

    def _product(self, values: Tensor) -> Tensor:
        """From V (B|1, Hk, Hq or 1, M, Dv)."""
        self._ask_product(values)
        return self._pass.take(("product", id(values)))

    def logsumexp(self) -> Tensor:
        """``L_i = log Σ_j exp s_ij``: (B, Hq, N), natural logarithm; −inf for a row that sees no key."""
        return self._pass.take("logsumexp").to(self.dtype)

    def entropy(self) -> Tensor:
        """``H_i = −Σ_j P_ij log P_ij``: (B, Hq, N), in nats, from 0 (one key) to log M (all alike)."""
        self._ask_entropy()
        return self._pass.take("entropy").to(self.dtype)

    def received(self, weights: Tensor | None = None) -> Tensor:
        """What each key receives, ``Σ_i w_i P_ij``: (B, Hq, M), from weights (B|1, Hq|1, N) over queries, ones by default."""
        if weights is None:
            self._ask_received()
            return self._pass.take("received").to(self.dtype)
        self._ask_received(weights)
        return self._pass.take(("received", id(weights))).squeeze(-1).to(self.dtype)

    def mass(self, segments: Segments) -> Tensor:
        """The attention that each query gives to sets of keys: (B, Hq, N, S).

        A segment is a position, several, a slice, or a boolean mask (M,) or (B, M).

        >>> import torch
        >>> q, k = torch.randn(2, 1, 2, 50, 16)
        >>> A = AttentionMap(q, k, is_causal=True)
        >>> mass = A.mass({"sink": [0], "rest": slice(1, None)})
        >>> bool(torch.allclose(mass.sum(-1), torch.ones(1, 2, 50)))
        True
        """
        self._ask_mass(segments)
        return self._pass.take(("mass", id(segments))).to(self.dtype)

    @in_own_precision
    def viewers(self, weights: Tensor | None = None) -> Tensor:
        """The number of queries that may see each key, or the sum of their weights (B|1, 1, N): (B|1, Hq|1, M)."""
        *_, queries, keys = self.shape
        if weights is None:
            weights = torch.ones(1, 1, queries, device=self.device)
        weights = weights.to(self.dtype)
        if self._scores.rule is not None:
            return _blocked.viewers(self._scores, weights)
        if self._scores.is_causal:
            later = weights.flip(-1).cumsum(-1).flip(-1)
            return torch.nn.functional.pad(later, (0, keys - queries))
        visible = self._scores.visible()
        if visible.shape[2] == 1:  # all queries see the same keys
            return (weights.sum(dim=-1, keepdim=True) * visible.squeeze(2)).expand(-1, -1, keys)
        total = weights.new_zeros(())
        at_once = max(1, _ENTRIES_AT_ONCE // (visible.shape[0] * visible.shape[1] * visible.shape[3]))
        for some, seen in zip(weights.split(at_once, dim=2), visible.split(at_once, dim=2), strict=True):
            total = total + (some.unsqueeze(2) @ seen.to(self.dtype)).squeeze(2)
        return total.expand(*total.shape[:2], keys)

    def tell_progress(self, tell: Callable[[float], None]) -> None:
        """Have a long pass over the matrix tell which share of it is done, from 0 to 1; from several threads at once."""
        self._pass.progress = tell

    def _expect(self, question: str, *arguments: object) -> None:
        ask: Callable[..., None] = getattr(self, f"_ask_{question}")
        ask(*arguments)

    def product_alongside(self, values: Tensor) -> Tensor | None:
        """``A @ values``, from the pass that answers the announced questions.

        None where nothing was announced, or the pass is in another precision than that of the values. They are those of
        the map's own call, (B, Hk or Hq, M, W).
        """
        exact = values.dtype == self._scores.query.dtype == self._scores.dtype
        return self._product(values) if exact and self._pass.pending else None

    # --- entries ------------------------------------------------------------------------------------------------------

    def _entries(self, targets: Tensor) -> Tensor:
        if self.shape[3] == 0:
            return self._new(*self.shape[:3])
        logsumexp = self._pass.take("logsumexp").to(self._scores.dtype)
        shares = torch.exp(self._scores.entries(targets) - logsumexp.masked_fill(logsumexp.isneginf(), 0.0))
        return shares.to(self.dtype)

    def _diagonals(self, offsets: list[int]) -> Tensor:
        if 0 in self.shape:
            return self._new(*self.shape[:3], len(offsets))
        logsumexp = self._pass.take("logsumexp").to(self._scores.dtype)
        shares = self._scores.diagonals(offsets) - logsumexp.masked_fill(logsumexp.isneginf(), 0.0)[..., None]
        return shares.exp().to(self.dtype)

    def _some_rows(self, index: Tensor) -> Tensor:
        every = torch.arange(self.shape[3], device=self.device)
        scores = self._scores
        sinks = None if scores.sinks is None else scores.sinks.to(scores.dtype).expand(self.shape[:3])[:, :, index]
        return _dense.probabilities(scores.logits(index, every, scores.dtype), sinks).to(self.dtype)

    # --- orderings and distances --------------------------------------------------------------------------------------

    def _topk(self, k: int) -> TopK:
        batch, heads, queries, _ = self.shape
        shares = torch.zeros(batch, heads, queries, k, dtype=self.dtype, device=self.device)
        index = torch.full(shares.shape, -1, dtype=torch.long, device=self.device)
        if self._scores.rule is not None:
            for visible, matrix in _blocked.softmax_strips(self._scores):
                best = matrix.topk(min(k, visible.columns), dim=-1)
                found = visible.positions(self.device)[best.indices].masked_fill(best.values == 0, -1)
                visible.of_queries(shares)[..., : visible.columns].copy_(best.values)
                visible.of_queries(index)[..., : visible.columns].copy_(found)
            return TopK(shares, index)
        for strip, matrix in _tiled.softmax_strips(self._scores):
            best = matrix.topk(min(k, strip.columns), dim=-1)
            strip.of_queries(shares)[..., : strip.columns].copy_(best.values)
            strip.of_queries(index)[..., : strip.columns].copy_(best.indices.masked_fill(best.values == 0, -1))
        return TopK(shares, index)

    @torch.no_grad()
    def _mean_distance(self, start: int) -> Tensor:
        if self._scores.rule is None:
            self._ask_distance(start)
            return self._pass.take(("distance", start)).to(self.dtype)
        result = self._new(*self.shape[:3])
        for visible, matrix in _blocked.softmax_strips(self._scores):
            distance = distances(visible.rows, visible.positions(self.device), start).to(matrix.dtype)
            visible.of_queries(result).copy_(matrix.mul_(distance).sum(dim=-1))
        return result

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _ask_entropy(self) -> None:
        self._pass.ask("entropy", Question("entropy"))

    def _ask_mean_distance(self, query_start: int = 0, key_start: int = 0) -> None:
        if self._scores.rule is None and 0 not in self.shape:
            self._ask_distance(query_start - key_start)

    def _ask_distance(self, start: int) -> None:
        self._pass.ask(("distance", start), Question("distance", distance=start))

    def _ask_block_sums(self, of_queries: Tensor, of_keys: Tensor, weights: Tensor | None = None) -> None:
        if self._scores.requires_grad or 0 in self.shape:
            return
        self._check_blocks(of_queries, of_keys)
        key = _of_blocks(of_queries, of_keys, weights)
        if self._pass.knows(key):
            return
        column = torch.ones((), dtype=self.dtype, device=self.device).expand(self.shape[:3])
        columns = one_hot(of_keys.to(self.device), int(of_keys[-1]) + 1, self.dtype)[0, 0]
        blocks = Blocks(
            weights=column if weights is None else self._weight_column(weights),
            of_queries=of_queries.to(self.device),
            number=int(of_queries[-1]) + 1,
            columns=columns,
        )
        self._pass.ask(key, Question("blocks", blocks=blocks, argument=(of_queries, of_keys, weights)))

    def _block_sums(self, of_queries: Tensor, of_keys: Tensor, weights: Tensor | None) -> Tensor:
        if self._scores.requires_grad or (weights is not None and weights.requires_grad) or 0 in self.shape:
            return super()._block_sums(of_queries, of_keys, weights)
        self._ask_block_sums(of_queries, of_keys, weights)
        return self._pass.take(_of_blocks(of_queries, of_keys, weights)).to(self.dtype)

    def _ask_product(self, values: Tensor) -> None:
        refuse_forward_mode(values)
        batch, heads, *_ = self.shape
        key_heads = self._scores.key.shape[1]
        columns = values.expand(batch, heads if values.shape[1] == heads else key_heads, -1, -1)
        native = values.dtype == self._scores.query.dtype
        self._pass.ask(("product", id(values)), Question("values", columns, argument=values, native=native))

    def _ask_mass(self, segments: Segments) -> None:
        if self._pass.knows(("mass", id(segments))):
            return
        batch, _, _, keys = self.shape
        runs = _columns.runs(segments, keys)
        if runs is not None:
            self._pass.ask(("mass", id(segments)), Question("segments", segments=runs, argument=segments))
        else:
            columns = _columns.indicator_columns(segments, keys, batch, self.device)
            columns = columns.expand(batch, self._scores.key.shape[1], -1, -1)
            self._pass.ask(("mass", id(segments)), Question("values", columns, argument=segments))

    def _ask_received(self, weights: Tensor | None = None) -> None:
        batch, heads, queries, _ = self.shape
        if weights is None:
            column = torch.ones((), dtype=self.dtype, device=self.device).expand(batch, heads, queries)
            self._pass.ask("received", Question("received", column))
        else:
            refuse_forward_mode(weights)
            column = self._weight_column(weights)
            question = Question("weights", column.unsqueeze(-1), argument=weights)
            self._pass.ask(("received", id(weights)), question)

    def _transposed(self, weights: Tensor) -> Tensor:
        refuse_forward_mode(weights)
        weights = weights.expand(*self.shape[:3], -1)
        key = ("transposed", id(weights))
        self._pass.ask(key, Question("weights", weights))
        return self._pass.take(key)


def _of_blocks(of_queries: Tensor, of_keys: Tensor, weights: Tensor | None) -> Hashable:
    return "block sums", id(of_queries), id(of_keys), id(weights)
