"""Attention by one call, under rules too, which the open blocks see as they see PyTorch's."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional

from regard.maps import AttentionMap
from regard.masks import Mask
from regard.runtime import attention as run_end
from regard.runtime import chain
from regard.runtime.call import AttentionCall


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(scale · Q Kᵀ + mask) V`` under a rule: ``scaled_dot_product_attention`` that visits visible tiles alone.

    Its cost is that of the visible tiles, forward and backward: N·w for a window of w. Nothing of size N×M is made. A query
    that sees no key gives zeros.

    Args:
        query: (B, Hq, N, D), of float16, bfloat16, float32 or float64.
        key: (B, Hk, M, D); with ``enable_gqa`` Hk may be a divisor of Hq.
        value: (B, Hk, M, Dv).
        mask: a rule of `regard.masks`.
        attn_mask: boolean (True: visible) or additive, broadcastable to (B, Hq, N, M); a pair that it hides is hidden too.
        is_causal: query i sees no key j > i.
        scale: factor of the logits; 1/√D by default.
        enable_gqa: let neighbouring query heads share a head of keys and values.
        softcap: c, makes ``c · tanh(s / c)`` of the logits s before the mask.
        sinks: logits, one for each head (Hq,), for each of a batch (B, Hq), or for each row (B, Hq, N); a sink takes its
            share of a row's probability and gives it to no key.

    Returns:
        (B, Hq, N, Dv), in the query's dtype; differentiable in query, key, value, sinks and an additive mask.

    Raises:
        ValueError, TypeError: inputs that SDPA would refuse, and masks that are not of the call's size.

    Example:
        >>> import torch, regard
        >>> from regard import masks
        >>> q, k, v = torch.randn(3, 1, 4, 1000, 32)
        >>> regard.attention(q, k, v, mask=masks.window(left=63, right=0)).shape
        torch.Size([1, 4, 1000, 32])
    """
    if mask is None and softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    matrix = AttentionMap(query, key, attn_mask, is_causal, scale, enable_gqa, softcap=softcap, sinks=sinks, mask=mask)
    (batch, heads, _, keys), key_heads = matrix.shape, key.shape[1]
    fits = (
        value.ndim == 4 and value.shape[0] in (1, batch) and value.shape[1] in (1, key_heads) and value.shape[2] == keys
    )
    if not fits or value.dtype != query.dtype or value.device != query.device:
        raise ValueError(
            f"value must be ({batch}, {key_heads}, {keys}, width), of {query.dtype} on {query.device}; "
            f"got {tuple(value.shape)}, of {value.dtype} on {value.device}"
        )

    def make() -> Tensor:
        return matrix @ value

    if not chain.looked_at():
        return make()
    query, key, value = (
        query.expand(batch, heads, -1, -1),
        key.expand(batch, -1, -1, -1),
        value.expand(batch, key_heads, -1, -1),
    )
    call = AttentionCall(
        query,
        key,
        value,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        softcap=softcap,
        sinks=sinks,
        rule=mask,
    )
    return chain.intercept(call, partial(run_end.attend, make))
