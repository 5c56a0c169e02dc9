"""The logits of one attention call, as a description that kernels evaluate piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from regard.masks import Mask, causal

# Rounding in a logit s is about |s| times the unit roundoff, and becomes the relative error of a probability. Beyond
# these magnitudes the error would pass 1e-5 (float32 inputs) or 1e-3 (half inputs, evaluated in float32), so the
# call is evaluated one precision higher.
_FLOAT32_LIMIT = 64.0
_HALF_LIMIT = 4096.0
_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Scores:
    """``s[i, j] = scale * query[i] · key[j] + mask[i, j]``, never evaluated as a whole.

    ``query`` is (B, Hq, N, D) and ``key`` (B, Hk, M, D) with Hk a divisor of Hq; ``mask`` is boolean (True: visible) or
    additive, of four dimensions each of which is 1 or that of (B, Hq, N, M); ``is_causal`` hides ``j > i``; ``rule``
    hides besides what it does not show. ``bound`` is the `limit`, where it is known. Before the mask, ``softcap`` c makes
    ``c · tanh(s / c)`` of s. ``sinks``, of three dimensions each of which is 1 or that of (B, Hq, N), are one more logit of
    each row, whose probability goes to no key.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    bound: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    rule: Mask | None = None

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def requires_grad(self) -> bool:
        tensors = (self.query, self.key, self.mask, self.sinks)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    @cached_property
    def limit(self) -> float:
        """An upper bound on the magnitude of the logits that carry weight."""
        if self.bound is not None:
            return self.bound
        limit = abs(self.scale) * _largest_product(self.query, self.key)
        if not math.isfinite(limit):
            raise ValueError(_describe_not_finite(self.query, self.key))
        if self.softcap is not None:
            limit = min(limit, self.softcap)
        if self.sinks is not None:
            limit = max(limit, _largest_sink(self.sinks))
        if self.mask is not None and self.mask.is_floating_point():
            limit += _largest_row_bias(self.mask)
        return limit

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision in which statistics are evaluated."""
        if self.query.dtype == torch.float64:
            return torch.float64
        most = _FLOAT32_LIMIT if self.query.dtype == torch.float32 else _HALF_LIMIT
        return torch.float32 if self.limit <= most else torch.float64

    def heads(self, index: list[int]) -> Scores:
        """The call with these query heads alone."""
        keys = [head // self.groups for head in index]
        mask = self.mask if self.mask is None or self.mask.shape[1] == 1 else self.mask[:, index]
        sinks = self.sinks if self.sinks is None or self.sinks.shape[1] == 1 else self.sinks[:, index]
        rule = None if self.rule is None else self.rule.heads(index).to(self.query.device)
        key = self.key[:, keys]
        return replace(self, query=self.query[:, index], key=key, mask=mask, sinks=sinks, rule=rule)

    def visible(self) -> Tensor:
        """Which entries the mask, if there is one, leaves visible, in the mask's own shape."""
        if self.mask is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.query.device)
        return self.mask if self.mask.dtype == torch.bool else ~self.mask.isneginf()

    @property
    def has_probability_rows(self) -> bool:
        """Whether each row that sees a key sums to 1: not where a sink takes its share."""
        return self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        """``c · tanh(s / c)``, where there is a soft cap c."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def logits(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """The block (B, Hq, len(rows), len(columns)) of logits, −inf where hidden."""
        query = self.query[:, :, rows].to(dtype) * self.scale
        key = self.key[:, :, columns].to(dtype).repeat_interleave(self.groups, dim=1)
        scores = self.capped(query @ key.transpose(-1, -2))
        if self.mask is not None:
            scores = apply_mask_(scores, self.mask.expand(self.shape)[:, :, rows][..., columns])
        if self.is_causal:
            scores = scores.masked_fill(columns > rows[:, None], -math.inf)
        if self.rule is not None:
            scores = scores.masked_fill(self._hidden(self.rule, rows[:, None], columns), -math.inf)
        return scores

    def entries(self, targets: Tensor) -> Tensor:
        """The logits ``s[i, targets[i]]``, (B, Hq, N), from targets (B, N); −inf where hidden or the target is −1."""
        batch, heads, queries, _ = self.shape
        index = targets.clamp(min=0)
        key_index = index[:, None, :, None].expand(batch, self.key.shape[1], queries, self.key.shape[3])
        key = self.key.gather(2, key_index).to(self.dtype).repeat_interleave(self.groups, dim=1)
        scores = self.capped(self.scale * torch.linalg.vecdot(self.query.to(self.dtype), key))
        if self.mask is not None:
            mask = self.mask.expand(self.shape)
            entry = mask.gather(3, index[:, None, :, None].expand(batch, heads, queries, 1)).squeeze(-1)
            scores = apply_mask_(scores, entry)
        hidden = targets < 0
        if self.is_causal:
            hidden = hidden | (targets > torch.arange(queries, device=targets.device))
        if self.rule is not None:
            rows = torch.arange(queries, device=targets.device)[:, None]
            unseen = self._hidden(self.rule, rows, index[:, None, :, None])
            scores = scores.masked_fill(unseen.squeeze(-1), -math.inf)
        return scores.masked_fill(hidden[:, None], -math.inf)

    def _hidden(self, rule: Mask, rows: Tensor, columns: Tensor) -> Tensor:
        """Which pairs the rule hides, of rows (…, n, 1) and columns that broadcast to (B, 1, n, m)."""
        batch, heads, *_ = self.shape
        b, h = torch.arange(batch, device=rows.device), torch.arange(heads, device=rows.device)
        return ~rule.visible(b[:, None, None, None], h[:, None, None], rows, columns)


def apply_mask_(scores: Tensor, mask: Tensor) -> Tensor:
    """Hide, in place, what a boolean mask hides; or add an additive one."""
    return scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)


def make_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rule: Mask | None = None,
) -> Scores:
    """Check one call's inputs, as SDPA would, and bring them to one form."""
    _check_tensors(query, key)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal=True exclude each other, as in SDPA: put the triangle in attn_mask")
    batch = _broadcast_batch(query, key)
    heads = _check_heads(query.shape[1], key.shape[1], enable_gqa)
    key_heads = key.shape[1] if query.shape[1] % key.shape[1] == 0 else heads
    if query.shape[:2] != (batch, heads) or key.shape[:2] != (batch, key_heads):
        query, key = query.expand(batch, heads, -1, -1), key.expand(batch, key_heads, -1, -1)
    shape = (batch, heads, query.shape[2], key.shape[2])
    mask = None if attn_mask is None else _check_mask(attn_mask, shape, query)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number, as 50.0 is, or None for no cap; got {softcap!r}")
    sinks = None if sinks is None else _check_sinks(sinks, shape, query)
    if rule is not None:
        _check_rule(rule, shape)
        rule = (rule & causal() if is_causal else rule).to(query.device)
        is_causal = False
    return Scores(
        query, key, mask, is_causal, float(scale), bound=0.0 if 0 in shape else None,
        softcap=None if softcap is None else float(softcap), sinks=sinks, rule=rule,
    )  # fmt: skip


def _check_rule(rule: Mask, shape: tuple[int, int, int, int]) -> None:
    if not isinstance(rule, Mask):
        what = f"a tensor of shape {tuple(rule.shape)}" if isinstance(rule, Tensor) else type(rule).__name__
        raise TypeError(
            f"mask is a rule of regard.masks, such as masks.causal(), got {what}: pass a tensor as attn_mask, "
            "a mask_mod through masks.from_mask_mod, a BlockMask through masks.from_block_mask"
        )
    rule.check(*shape)


def _check_tensors(query: Tensor, key: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise TypeError(
                f"{name} is a nested tensor; pad it with torch.nested.to_padded_tensor and pass an attn_mask"
            )
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, tokens, head_dim), got shape {tuple(tensor.shape)}")
        if 0 in (tensor.shape[1], tensor.shape[3]):
            raise ValueError(f"{name} has no heads or no head_dim: shape {tuple(tensor.shape)}")
        if tensor.dtype not in _SUPPORTED:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, _SUPPORTED))}")
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must share a dtype, got {query.dtype} and {key.dtype}")
    if query.device != key.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key differ in head_dim: {query.shape[-1]} and {key.shape[-1]} "
            f"(query {tuple(query.shape)}, key {tuple(key.shape)})"
        )


def _broadcast_batch(query: Tensor, key: Tensor) -> int:
    if 1 not in (query.shape[0], key.shape[0]) and query.shape[0] != key.shape[0]:
        raise ValueError(f"query has batch {query.shape[0]} and key {key.shape[0]}; they must agree, or one be 1")
    return query.shape[0] if key.shape[0] == 1 else key.shape[0]


def _check_heads(query_heads: int, key_heads: int, enable_gqa: bool) -> int:
    if query_heads == key_heads or 1 in (query_heads, key_heads):
        return max(query_heads, key_heads)
    if not enable_gqa:
        raise ValueError(f"query has {query_heads} heads and key {key_heads}; pass enable_gqa=True for grouped heads")
    if query_heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads divisible by key heads, got {query_heads} and {key_heads}")
    return query_heads


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int], query: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be boolean (True: visible) or floating point (added), got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask is on {mask.device}, query on {query.device}")
    if mask.ndim > 4 or any(size not in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {shape}")
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))


def _check_sinks(sinks: Tensor, shape: tuple[int, int, int, int], query: Tensor) -> Tensor:
    """As (B or 1, Hq or 1, N or 1), from one for each head, for each head of a batch, or for each row."""
    batch, heads, queries, _ = shape
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be logits, of a floating point dtype, got {sinks.dtype}")
    if sinks.device != query.device:
        raise ValueError(f"sinks are on {sinks.device}, query on {query.device}")
    sizes = tuple(sinks.shape)
    three = {1: (1, *sizes, 1), 2: (*sizes, 1), 3: sizes}.get(sinks.ndim, ())
    wanted = (batch, heads, queries)
    if not three or any(size not in (1, full) for size, full in zip(three, wanted, strict=True)):
        raise ValueError(
            f"sinks must be one logit for each head ({heads},), for each of a batch ({batch}, {heads}), or broadcast to "
            f"the rows {wanted}; got shape {sizes}"
        )
    return sinks.reshape(three)


def _largest_product(query: Tensor, key: Tensor) -> float:
    """The largest norm of a query times that of a key, in float32 at least: no product of the two is larger."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if torch.is_grad_enabled():
        query, key = query.detach(), key.detach()
    of_queries = torch.linalg.vector_norm(query, dim=-1, dtype=dtype).amax()
    return float(of_queries * torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax())


def _largest_sink(sinks: Tensor) -> float:
    """The largest magnitude; −∞ stands for no sink."""
    with torch.no_grad():
        finite = sinks.masked_fill(sinks.isneginf(), 0.0)
        largest = float(finite.abs().amax())
    if not math.isfinite(largest):
        raise ValueError("sinks hold NaN or +infinity; they are logits, and −infinity stands for no sink")
    return largest


def _largest_row_bias(mask: Tensor) -> float:
    """How large the bias is on the keys that a query does look at; a bias far below its row's best weighs nothing."""
    best = mask.detach().amax(dim=-1).abs()
    best = best[best < torch.finfo(mask.dtype).max / 2]
    return float(best.max()) if best.numel() else 0.0


def _describe_not_finite(query: Tensor, key: Tensor) -> str:
    for name, tensor in (("query", query), ("key", key)):
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            kind = "NaN" if tensor[tuple(bad[0])].isnan() else "an infinity"
            return (
                f"{name} holds {kind}: {len(bad)} entries that are not finite, the first at "
                f"(batch, head, token, dim) = {tuple(bad[0].tolist())} of {tuple(tensor.shape)}"
            )
    return f"query and key are too large for {query.dtype}: their products overflow"
