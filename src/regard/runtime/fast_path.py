"""The fused operators of PyTorch's transformer layers in evaluation, with the attention inside them read beside them.

What the operators put out differs from what SDPA would: padding is zero, rows that see no key are NaN, a hint that a mask is
causal is not believed. So they make the output, as they always do, and where somebody reads, the projection and the attention
are computed once more. Where somebody edits, the layers are kept from them, and go through SDPA.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, TransformerEncoder, functional

from regard.runtime import chain
from regard.runtime.attention import attend, run
from regard.runtime.call import AttentionCall, Place
from regard.runtime.stack import Stack

PLAIN_ENABLED: Callable[[], bool] = torch.backends.mha.get_fastpath_enabled
"""PyTorch's own ``torch.backends.mha.get_fastpath_enabled``."""
_plain_multi_head: Callable[..., Any] = torch._native_multi_head_attention
_plain_encoder_layer: Callable[..., Tensor] = torch._transformer_encoder_layer_fwd


def enabled() -> bool:
    """Whether a layer may take its fast path: as it was set, but not where its attention is to be changed."""
    return PLAIN_ENABLED() and not chain.edited(_module_of(sys._getframe(1)))


def multi_head(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, *more: Any, **named: Any,
) -> Any:  # fmt: skip
    """``torch._native_multi_head_attention``, given one input as query, key and value by `nn.MultiheadAttention`."""
    plain = functools.partial(
        _plain_multi_head, query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
        *more, **named,
    )  # fmt: skip
    if not chain.looked_at():
        return plain()
    with chain.unseen():
        output = plain()
    _read(None, functools.partial(_call, query, num_head, qkv_weight, qkv_bias, mask))
    return output


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``, by which `nn.TransformerEncoderLayer` passes its ``self_attn`` by."""
    plain = functools.partial(
        _plain_encoder_layer, src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu,
        norm_first, eps, norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1,
        ffn_weight_2, ffn_bias_2, mask, mask_type,
    )  # fmt: skip
    if not chain.looked_at():
        return plain()
    with chain.unseen():
        output = plain()
    norm = functools.partial(
        functional.layer_norm, normalized_shape=(embed_dim,), weight=norm_weight_1, bias=norm_bias_1, eps=eps
    )
    attention = getattr(_module_of(sys._getframe(1)), "self_attn", None)
    first = norm if norm_first else None
    _read(attention, functools.partial(_call, src, num_heads, qkv_weight, qkv_bias, mask, first))
    return output


def _read(part: Module | None, make: Callable[[], AttentionCall]) -> None:
    """Have the call be read that the operator made inside; ``part`` is the module that would have made it."""
    with torch.no_grad():
        chain.read_beside(make, lambda last, normal: attend(lambda: run(last), last, normal), part)


def _call(
    tokens: Tensor, heads: int, weight: Tensor, bias: Tensor, mask: Tensor | None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> AttentionCall:  # fmt: skip
    """What the operator computes: it hides each key whose number in the mask is not zero, be it −∞ or a bias.

    It nests texts of their own lengths, and leaves NaN in rows that see no key: such tokens are padding, and not there.
    """
    visible = None if mask is None else ~mask.bool()
    if visible is not None and visible.ndim == 2:  # (batch, keys)
        visible = visible[:, None, None, :]
    tokens, real = _padded(tokens) if tokens.is_nested else (tokens, ~tokens.isnan().any(dim=-1))
    place = Place()
    if not bool(real.all()):
        tokens, place = tokens.masked_fill(~real[..., None], 0.0), Place(token_mask=real)
        visible = real[:, None, None, :] if visible is None else visible & real[:, None, None, :]
    tokens = tokens if norm is None else norm(tokens)
    query, key, value = functional.linear(tokens, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return AttentionCall(query, key, value, visible, place=place)


def _padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as (batch, tokens, width) and which of them are real; as long as what an encoder nested it from."""
    lengths = torch.tensor([len(text) for text in tokens.unbind()], device=tokens.device)
    longest = int(lengths.max())
    for frame in Stack().frames:
        if isinstance(frame.module, TransformerEncoder):
            given = frame.positional[0] if frame.positional else frame.arguments["src"]
            longest = longest if given.is_nested else given.shape[1]
    padded = torch.nested.to_padded_tensor(tokens, 0.0, (len(lengths), longest, tokens.size(-1)))
    return padded, torch.arange(longest, device=tokens.device) < lengths[:, None]


def _module_of(frame: Any) -> Module | None:
    """The module in whose method a frame is."""
    module = frame.f_locals.get("self")
    return module if isinstance(module, Module) else None
