"""The definition, written out in float64."""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass
class Call:
    """Arguments of an AttentionMap, and its matrix by the definition."""

    query: Tensor
    key: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    softcap: float | None = None
    sinks: Tensor | None = None

    def arguments(self) -> dict[str, object]:
        return {
            "query": self.query,
            "key": self.key,
            "attn_mask": self.attn_mask,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": True,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }

    def logits(self) -> Tensor:
        query, key = self.query.double(), self.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = scale * query @ key.transpose(-1, -2)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.attn_mask is not None and self.attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~self.attn_mask, -math.inf)
        elif self.attn_mask is not None:
            logits = logits + self.attn_mask.double()
        if self.is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return logits

    def logsumexp(self) -> Tensor:
        logits = self.logits()
        if self.sinks is not None:  # (Hq,), (B, Hq) or of three dimensions
            sinks = self.sinks.double()
            sinks = sinks[:, None] if sinks.ndim == 1 else sinks[..., None] if sinks.ndim == 2 else sinks
            logits = torch.cat([logits, sinks.expand(logits.shape[:3])[..., None]], dim=-1)
        blind = logits.isneginf().all(dim=-1, keepdim=True)
        total = logits.masked_fill(blind, 0.0).logsumexp(dim=-1)
        return total.masked_fill(blind.squeeze(-1), -math.inf)

    def matrix(self) -> Tensor:
        logits = self.logits()
        blind = logits.isneginf().all(dim=-1, keepdim=True)  # of whose log-sum-exp there is no gradient
        total = self.logsumexp()[..., None].masked_fill(blind, 0.0)
        return torch.exp(logits - total).masked_fill(blind, 0.0)

    def entropy(self) -> Tensor:
        return torch.special.entr(self.matrix()).sum(-1)


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,), masks: bool = True) -> Call:
    """Any call: batch, grouped heads, lengths, mask of any broadcastable shape, scale, layout, soft cap, sinks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, key_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    width, size = draw(st.integers(1, 24)), draw(st.sampled_from([0.1, 1.0, 4.0]))
    dtype = draw(st.sampled_from(dtypes))
    heads = key_heads * groups

    def tensor(*shape: int) -> Tensor:
        layout = draw(
            st.sampled_from(["contiguous", "as models transpose it", "last dimension strided", "every other"])
        )
        if layout == "as models transpose it":
            return torch.randn(shape[0], shape[2], shape[1], shape[3], generator=generator).transpose(1, 2)
        if layout == "last dimension strided":
            return torch.randn(shape[0], shape[1], shape[3], shape[2], generator=generator).mT
        if layout == "every other":
            return torch.randn(*shape[:3], 2 * shape[3], generator=generator)[..., ::2]
        return torch.randn(shape, generator=generator)

    query = (size * tensor(batch, heads, queries, width)).to(dtype)
    key = tensor(batch, key_heads, keys, width).to(dtype)
    kind = draw(st.sampled_from(["none", "causal", "boolean", "additive"] if masks else ["none", "causal"]))
    mask = None
    if kind in ("boolean", "additive"):
        full = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
        shape = full[draw(st.integers(0, 2)) :]
        mask = torch.rand(shape, generator=generator) > 0.3
        if kind == "additive":
            mask = torch.where(mask, torch.randn(shape, generator=generator), -math.inf)
    scale = draw(st.sampled_from([None, 0.05, 0.7]))
    softcap = draw(st.sampled_from([None, None, 2.0, 50.0]))
    sinks = None
    if draw(st.integers(0, 3)) == 0:
        sizes = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries)]
        sizes = draw(st.sampled_from([[heads], [batch, heads], sizes]))
        sinks = 2 * torch.randn(sizes, generator=generator)
    return Call(query, key, mask, kind == "causal", scale, softcap, sinks)
