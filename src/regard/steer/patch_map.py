"""Put the attention matrix of another run's heads in the place of one's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall, Column
from regard.steer._capture import capture, check_source
from regard.steer.add import with_own_keys
from regard.steer.edit import Edit, query_set
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class PatchMap(Edit):
    """``O' = P V``, P the attention matrix of another run, V one's own values: where a head looks, and not what it finds.

    The matrix is not stored: of chosen heads or queries the other run's queries and keys stand beside one's own, of all of a
    layer in their place. Edits of the logits that come later act on it; directions are added before it.

    Args:
        source: what ``capture(model, maps=True)`` kept of that run, which went through the same layers with as many tokens.
            If one pass was captured, it serves every pass; otherwise each pass has its own.
        queries: only these rows; all by default.

    Raises:
        TypeError: a source that is no captured run.
        ValueError: a run without maps; another shape; masks that differ, where heads or queries are chosen.

    K. Wang et al. (2023), Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v, other_q, other_k = torch.randn(5, 1, 2, 5, 8)
    >>> with regard.capture(None, maps=True) as source:
    ...     _ = attention(other_q, other_k, v)
    >>> with regard.steer(None, regard.PatchMap(source, heads=1)):
    ...     patched = attention(q, k, v)
    >>> bool(torch.allclose(patched[:, 1], attention(other_q, other_k, v)[:, 1], atol=1e-6))
    True
    """

    source: capture
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_source(self, self.source)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Other queries and keys, or more of them."""
        rows = query_set(self.queries, call, heads)
        if self.queries is not None and not bool(rows.any()):
            return call
        other = self.source.at(call.place.path, call.place.pass_index).call
        if other is None:
            raise ValueError("PatchMap needs what capture(model, maps=True) keeps, but maps were not asked for")
        _check_shapes(call, other)
        if call.key.shape[1] != other.key.shape[1]:  # edits before this one, or around that run, set them apart
            call, other = with_own_keys(call), with_own_keys(other)
        return _beside(call, other, rows) if rows.numel() > 1 else _instead(call, other)


def _instead(call: AttentionCall, other: AttentionCall) -> AttentionCall:
    """All rows of all heads: the other call with one's own values."""
    batch, mask = call.query.shape[0], other.attn_mask
    return replace(
        call,
        query=other.query.to(call.query).expand(batch, -1, -1, -1),
        key=other.key.to(call.key).expand(batch, -1, -1, -1),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(call.query.dtype),
        is_causal=other.is_causal,
        scale=other.factor,
        enable_gqa=call.enable_gqa or other.enable_gqa,
        rule=other.rule,
        columns=other.columns,
        own=other.own,
    )


def _beside(call: AttentionCall, other: AttentionCall, rows: Tensor) -> AttentionCall:
    """``[Q, 0] [K, K']ᵀ`` in the rows that stay, ``[0, Q'] [K, K']ᵀ`` in the others."""
    if not _masks_equal(call, other):
        raise ValueError(
            f"PatchMap: the masks of {call.place.path} differ between the two runs, as with other padding; give both texts "
            "the same, or patch all heads and queries of the layer"
        )
    theirs, batch = rows[..., None], call.query.shape[0]
    query, key = (tensor.to(call.query).expand(batch, -1, -1, -1) for tensor in (other.query, other.key))
    if other.factor != call.factor:
        query = query * (other.factor / call.factor)
    own = rows.new_zeros(()) if call.own is None else call.own
    other_own = rows.new_zeros(()) if other.own is None else other.own
    kept = None if call.own is None and other.own is None else torch.where(rows, other_own, own)
    return replace(
        call,
        query=torch.cat([call.query.where(~theirs, 0.0), query.where(theirs, 0.0)], dim=-1),
        key=torch.cat([call.key, key], dim=-1),
        scale=call.factor,
        columns=(*_in_rows(call.columns, ~rows), *_in_rows(other.columns, rows)),
        own=kept,
    )


def _in_rows(columns: tuple[Column, ...], rows: Tensor) -> tuple[Column, ...]:
    return tuple(replace(column, query=column.query.where(rows, 0.0)) for column in columns)


def _check_shapes(call: AttentionCall, other: AttentionCall) -> None:
    own, theirs = ((*c.query.shape[:3], c.key.shape[2]) for c in (call, other))
    if own[1:] != theirs[1:] or theirs[0] not in (1, own[0]):
        names = "(batch, heads, queries, keys)"
        raise ValueError(
            f"PatchMap: {call.place.path} has {names} {own}, the captured run {theirs}; both runs need as many tokens. "
            "Choose the pass with passes= where they differ"
        )


def _masks_equal(call: AttentionCall, other: AttentionCall) -> bool:
    own, theirs = call.attn_mask, other.attn_mask
    if call.is_causal != other.is_causal or (own is None) != (theirs is None) or call.rule is not other.rule:
        return False
    if own is None or theirs is None or own is theirs:
        return True
    try:
        shape = torch.broadcast_shapes(own.shape, theirs.shape)
    except RuntimeError:
        return False
    return own.dtype == theirs.dtype and bool((own.expand(shape) == theirs.expand(shape)).all())
