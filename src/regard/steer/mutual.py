"""Look at another run's keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from regard.runtime import AttentionCall, HiddenCall, Proceed, Site, entered
from regard.steer.edit import Edit, hiding


class capture:  # noqa: N801 - a context manager, named as what one writes
    """Keep the keys and values of every attention call that a model makes in the block, for `Mutual`.

    Args:
        model: as for `regard.steer`.

    Raises:
        RuntimeError: at the end of a block in which no attention call was seen.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 8)
    >>> with torch.no_grad(), regard.capture(layer) as source:
    ...     _ = layer(x, x, x)
    >>> source
    capture of MultiheadAttention
    """

    edits = outermost = False

    def __init__(self, model: Module | None) -> None:
        self._model = model
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> capture:
        self._kept.clear()
        self._entered = entered(self, self._model)
        self._block = self._entered.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.__exit__(None, None, None)
        if kind is None:
            self._block.check()

    def __repr__(self) -> str:
        return f"capture of {', '.join(self._kept) or 'nothing yet'}"

    def wants(self, site: Site) -> bool:
        """Every call."""
        return True

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """Keep what the call, edited by blocks around this one, looks at; a mixer has no keys to keep."""
        if isinstance(call, AttentionCall):
            self._kept.setdefault(call.place.path, []).append((call.key.detach(), call.value.detach()))
        return proceed(call)

    def of(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The keys and values for a call: those of the same layer and pass, or of the one pass that was captured."""
        kept = self._kept.get(call.place.path)
        if not kept:
            raise ValueError(
                f"nothing was captured of {call.place.path}; captured were {', '.join(self._kept) or 'no calls'}"
            )
        if len(kept) > 1 and call.place.pass_index >= len(kept):
            raise ValueError(
                f"{len(kept)} passes of {call.place.path} were captured, but this is pass {call.place.pass_index + 1}"
            )
        return kept[call.place.pass_index if len(kept) > 1 else 0]


@dataclass(frozen=True, repr=False)
class Mutual(Edit):
    """``softmax(scale · Q K'ᵀ) V'`` with another run's K' and V', or with both runs' side by side.

    Args:
        source: what `capture` kept of that run, which went through the same layers. If one pass was captured, it serves
            every pass; otherwise each pass has its own, as in two diffusion runs in step.
        beside: keep one's own keys too; those of the other run come after them.

    Raises:
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

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Other keys and values, or more of them."""
        call.require_queries("Mutual")
        key, value = (tensor.to(call.key) for tensor in self.source.of(call))
        own, other = tuple(call.key.shape), tuple(key.shape)
        if own[1::2] != other[1::2] or other[0] not in (1, own[0]):
            raise ValueError(f"Mutual: {call.place.path} has keys of shape {own}, the captured run {other}")
        key, value = (tensor.expand(own[0], -1, -1, -1) for tensor in (key, value))
        if self.beside:
            return _beside(call, key, value, heads)
        if own[2] != other[2] and (len(heads) > 1 or call.is_causal or call.attn_mask is not None):
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
