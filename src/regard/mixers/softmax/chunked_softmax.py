"""Exact softmax attention in the memory of a tile: chunks of queries against chunks of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.mixers.forms import Form, check_form
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import Facts
from regard.mixers.projected import Projected
from regard.mixers.softmax.softmax_attention import SoftmaxAttention, visible_keys
from regard.runtime import AttentionCall, attend, intercept, looked_at

QUERY_CHUNK = 512
KEY_CHUNK = 1024
_Result = TypeVar("_Result")


class Tile(NamedTuple):
    """A block of queries and keys: ``logits`` (B, H, n, m), ``values`` (B, H, m, Dv), and the ``factor`` (B, H, n, m) of
    probabilities before they mix values, None for 1."""

    logits: Tensor
    values: Tensor
    factor: Tensor | None = None


MakeTile = Callable[[slice, slice], Tile]
"""From queries and keys to their tile."""


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    form: Form = "chunked",
    query_chunk: int = QUERY_CHUNK,
    key_chunk: int = KEY_CHUNK,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``o_i = Σ_j softmax_j(scale · q_i·k_j) v_j``, exact, with no more than a tile of the matrix at a time.

    Each chunk of queries goes through chunks of keys with a running maximum m and sum: ``m' = max(m, max_j s_ij)``, what was
    summed is multiplied by ``exp(m − m')``, and ``exp(s_ij − m')`` is added. Tiles are computed again in the backward pass,
    so that gradients take no more; with chunks of √N that is O(√N) beside inputs and outputs. Causal calls skip the tiles
    that lie behind all of their queries.

    Args:
        query: (B, H, N, Dk).
        key, value: (B, H, M, Dk) and (B, H, M, Dv); of any length where ``causal=False`` (cross-attention), of N or more
            where the queries are the last N of their tokens.
        state: keys and values before these, (B, H, M₀, Dk) and (B, H, M₀, Dv).
        mask: boolean (True: visible) or additive, broadcastable to (B, H, N, M₀ + M). A query that sees no key gets zeros.
        causal: each query sees the keys up to its own, the last query the last key.
        scale: 1/√Dk by default.
        form: "parallel" one tile, stored; "chunked"; "recurrent" query by query.
        query_chunk, key_chunk: sides of a tile (the paper's are 1,024 and 4,096, for accelerators).

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state: all keys and values.

    Raises:
        ValueError: shapes that do not fit, chunks of no tokens, more queries than keys in a causal call.

    M. N. Rabe and C. Staats (2021), Self-attention Does Not Need O(n²) Memory.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> y, state = chunked_attention(q, k, v, query_chunk=16, key_chunk=32)
    >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> bool(torch.allclose(y, dense, atol=1e-5))
    True
    >>> cross, _ = chunked_attention(q, k[:, :, :7], v[:, :, :7], causal=False)
    >>> cross.shape
    torch.Size([1, 2, 100, 16])
    """
    check_form(form)
    _check(query, key, value, state)
    if state is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(state, (key, value), strict=True))
    shape = (*query.shape[:3], key.shape[2])
    if causal and shape[2] > shape[3]:
        raise ValueError(f"a causal call needs a key for each query, got {shape[2]} queries and {shape[3]} keys")
    whole = _expanded(mask, shape)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(value.dtype, torch.float32)

    def tile(rows: slice, columns: slice) -> Tile:
        logits = scale * query[:, :, rows].to(dtype) @ key[:, :, columns].to(dtype).mT
        if whole is not None:
            part = whole[:, :, rows, columns]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
        return Tile(logits, value[:, :, columns].to(dtype))

    output = attend_by_tiles(tile, (shape[2], shape[3]), causal, form, (query_chunk, key_chunk))
    return output.to(value.dtype), (key, value)


def attend_by_tiles(
    tile: MakeTile,
    size: tuple[int, int],
    causal: bool,
    form: Form,
    chunks: tuple[int, int],
    *,
    stored: bool = False,
) -> Tensor:
    """``o_i = Σ_j softmax_j(logits)_ij factor_ij v_j`` of an N×M matrix that is known by its tiles, in any of the forms.

    ``stored`` keeps the tiles for the backward pass, which `torch.func` needs.
    """
    if min(chunks) < 1:
        raise ValueError(
            f"query_chunk and key_chunk must be at least 1, got {', '.join(str(chunk) for chunk in chunks)}"
        )
    queries, keys = size
    ahead = keys - queries if causal else keys  # query i sees keys up to i + ahead
    if form == "parallel":
        return _summed(_hidden(tile, slice(0, queries), slice(0, keys), ahead))
    step = 1 if form == "recurrent" else chunks[0]

    def strip(start: int) -> Tensor:
        rows = slice(start, min(start + step, queries))
        seen = min(rows.stop + ahead, keys)
        if form == "recurrent":
            return _summed(_hidden(tile, rows, slice(0, seen), ahead))
        return _strip(tile, rows, seen, ahead, chunks[1], stored)

    again = form == "chunked" and not stored
    return torch.cat([_recomputed(strip, start, again=again) for start in range(0, queries, step)], dim=2)


def _strip(tile: MakeTile, rows: slice, seen: int, ahead: int, chunk: int, stored: bool) -> Tensor:
    """One chunk of queries against the chunks of the keys that it sees."""

    def part(start: int) -> tuple[Tensor, Tensor, Tensor]:
        return _partial(_hidden(tile, rows, slice(start, min(start + chunk, seen)), ahead))

    top, total, mixed = _recomputed(part, 0, again=not stored)
    for start in range(chunk, seen, chunk):
        other = _recomputed(part, start, again=not stored)
        higher = torch.maximum(top, other[0])
        old, new = ((peak - _finite(higher)).exp() for peak in (top, other[0]))
        top, total, mixed = higher, old * total + new * other[1], old * mixed + new * other[2]
    return mixed / total.masked_fill(total == 0, 1.0)


def _summed(tile: Tile) -> Tensor:
    _, total, mixed = _partial(tile)
    return mixed / total.masked_fill(total == 0, 1.0)


def _partial(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tile: the maximum of each row, and the sums of exp(s − max) and of what that mixes."""
    top = tile.logits.detach().amax(-1, keepdim=True)  # any number gives the same output: no gradient
    weights = (tile.logits - _finite(top)).exp()
    mixing = weights if tile.factor is None else weights * tile.factor
    return top, weights.sum(-1, keepdim=True), mixing @ tile.values


def _finite(top: Tensor) -> Tensor:
    """0 for rows that have seen no key yet."""
    return top.masked_fill(top.isneginf(), 0.0)


def _hidden(tile: MakeTile, rows: slice, columns: slice, ahead: int) -> Tile:
    """A tile without the keys behind its queries."""
    made = tile(rows, columns)
    if columns.stop - 1 <= rows.start + ahead:
        return made
    ones = torch.ones(made.logits.shape[2:], dtype=torch.bool, device=made.logits.device)
    return made._replace(logits=made.logits.masked_fill(ones.triu(rows.start + ahead - columns.start + 1), -torch.inf))


def _recomputed(function: Callable[[int], _Result], start: int, *, again: bool) -> _Result:
    """The function's result; nothing inside it is stored for the backward pass, where it runs again."""
    if not (again and torch.is_grad_enabled()):
        return function(start)
    result: _Result = checkpoint(function, start, use_reentrant=False, preserve_rng_state=False)
    return result


def _check(query: Tensor, key: Tensor, value: Tensor, state: tuple[Tensor, Tensor] | None) -> None:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
    if any(tensor.ndim != 4 for tensor in (query, key, value)):
        raise ValueError(f"query, key and value must be (batch, heads, tokens, dim), got {shapes}")
    fits = query.shape[:2] == key.shape[:2] == value.shape[:2] and query.shape[3] == key.shape[3]
    if not fits or key.shape[2] != value.shape[2]:
        raise ValueError(
            "query, key and value must be of one batch and as many heads, query and key of one width, key and value of as "
            f"many tokens, got {shapes}"
        )
    if not (query.shape[2] and key.shape[2]):
        raise ValueError(f"there are no tokens: query, key and value are of shapes {shapes}")
    if state is None:
        return
    for name, old, new in zip(("keys", "values"), state, (key, value), strict=True):
        expected = (*new.shape[:2], state[0].shape[2], new.shape[3])
        if old.shape != expected:
            raise ValueError(f"the state's {name} must be of shape {expected}, got {tuple(old.shape)}")


def _expanded(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(f"mask must be broadcastable to {shape}, got {tuple(mask.shape)}")
    return mask.expand(shape)


class ChunkedSoftmaxAttention(SoftmaxAttention):
    """`SoftmaxAttention`, in the memory of a tile also where no fused kernel is at hand, and in its gradients.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each where there are rotary positions.
        rotary: the base of rotary positions, or None for none.
        query_chunk, key_chunk: sides of a tile.
        causal: else each token sees all, and no call goes on from a state.

    Raises:
        ValueError: heads that do not divide the width, odd head dimensions with rotary positions.

    M. N. Rabe and C. Staats (2021), Self-attention Does Not Need O(n²) Memory.

    >>> import torch
    >>> mixer = ChunkedSoftmaxAttention(32, heads=4, query_chunk=4, key_chunk=4)
    >>> y, state = mixer(torch.randn(2, 10, 32))
    >>> y.shape, state.tensors["value"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 10, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="M. N. Rabe and C. Staats (2021), Self-attention Does Not Need O(n²) Memory",
        formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j, by tiles with a running maximum and sum",
        time="O(N² D)",
        state="2 N D",
        bidirectional=True,
        cross=True,
        exact=True,
    )

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        rotary: float | None = 10_000.0,
        query_chunk: int = QUERY_CHUNK,
        key_chunk: int = KEY_CHUNK,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, heads, rotary, causal=causal)
        self.query_chunk, self.key_chunk = query_chunk, key_chunk

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tile by tile."""
        real = projected.get("real")
        mask = None if real is None else real[:, None, None]
        query, key = projected["query"], projected["key"]

        def tiles() -> Tensor:
            return chunked_attention(
                query, key, projected.value, mask=mask, causal=layout.causal,
                query_chunk=self.query_chunk, key_chunk=self.key_chunk,
            )[0]  # fmt: skip

        if not looked_at():
            return tiles(), {}
        visible, causal = visible_keys(projected, layout)
        call = AttentionCall(query, key, projected.value, visible, is_causal=causal)
        past = 0 if layout.cross else key.shape[2] - query.shape[2]
        return intercept(call, partial(attend, tiles), past=past), {}
