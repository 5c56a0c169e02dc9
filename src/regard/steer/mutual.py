"""Look at another run's keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.runtime import AttentionCall
from regard.steer._capture import capture, check_source
from regard.steer.edit import Edit, hiding


@dataclass(frozen=True, repr=False)
class Mutual(Edit):
    """``softmax(scale · Q K'ᵀ) V'`` with another run's K' and V', or with both runs' side by side.

    Args:
        source: what `capture` kept of that run, which went through the same layers. If one pass was captured, it serves
            every pass; otherwise each pass has its own, as in two diffusion runs in step.
        beside: keep one's own keys too; those of the other run come after them.

    Raises:
        TypeError: a source that is no captured run.
        ValueError: another batch or width; other numbers of keys, where heads are chosen or a mask or triangle has their
            number; a triangle, where both runs' keys stand side by side.

    M. Cao et al. (2023), MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v, other = torch.randn(4, 1, 2, 5, 8)
    >>> with regard.capture(None) as source:
    ...     _ = attention(q, other, other)
    >>> with regard.steer(None, regard.Mutual(source)):
    ...     mutual = attention(q, k, v)
    >>> bool(torch.allclose(mutual, attention(q, other, other)))
    True
    """

    source: capture
    beside: bool = False

    def __post_init__(self) -> None:
        check_source(self, self.source)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Other keys and values, or more of them."""
        call.require_queries("Mutual")
        kept = self.source.at(call.place.path, call.place.pass_index)
        key, value = (tensor.to(call.key) for tensor in (kept.key, kept.value))
        own, other = tuple(call.key.shape), tuple(key.shape)
        if own[1::2] != other[1::2] or other[0] not in (1, own[0]):
            raise ValueError(f"Mutual: {call.place.path} has keys of shape {own}, the captured run {other}")
        key, value = (tensor.expand(own[0], -1, -1, -1) for tensor in (key, value))
        if self.beside:
            return _beside(call, key, value, heads)
        masked = call.is_causal or call.attn_mask is not None or call.rule is not None
        if own[2] != other[2] and (len(heads) > 1 or masked):
            raise ValueError(
                f"Mutual: {call.place.path} has {own[2]} keys, the captured run {other[2]}; they must be as many here"
            )
        if len(heads) == 1:
            return replace(call, key=key, value=value)
        groups = call.query.shape[1] // own[1]
        mine, others = (
            [t.repeat_interleave(groups, dim=1) for t in pair] for pair in ((call.key, call.value), (key, value))
        )
        chosen = heads[None, :, None, None]
        key, value = (torch.where(chosen, theirs, ours) for ours, theirs in zip(mine, others, strict=True))
        return replace(call, key=key, value=value, enable_gqa=False)


def _beside(call: AttentionCall, key: Tensor, value: Tensor, heads: Tensor) -> AttentionCall:
    if call.is_causal:
        raise ValueError(
            f"Mutual(beside=True) needs attention without a triangle, but {call.place.path} is causal; give the model a mask"
        )
    if call.rule is not None:
        raise ValueError(
            f"Mutual(beside=True): {call.place.path} attends under a rule, which knows no keys of another run; put Restrict "
            "after Mutual, or give the model a mask"
        )
    own, added = call.key.shape[2], key.shape[2]
    mask = call.attn_mask
    if mask is not None:
        mask = pad(mask.expand(*mask.shape[:-1], own), (0, added), value=True if mask.dtype == torch.bool else 0.0)
    wider = replace(
        call, key=torch.cat([call.key, key], 2), value=torch.cat([call.value, value], 2), attn_mask=mask,
        columns=tuple(replace(c, key=pad(c.key.expand(-1, own), (0, added))) for c in call.columns),
        factors=tuple(replace(f, key=pad(f.key.expand(-1, own), (0, added))) for f in call.factors),
    )  # fmt: skip
    if len(heads) == 1:
        return wider
    others = torch.arange(own + added, device=key.device)[None] >= own
    return replace(wider, columns=(*wider.columns, hiding(~heads[None, :, None], others, wider)))
