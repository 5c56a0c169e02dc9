"""Gated linear attention: each channel of the memory is forgotten at a rate of its own, which the token sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, RMSNorm, Sequential, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear.short_convolution import ShortConvolution, convolved_parts
from regard.mixers.mixer import Facts, check_groups, expanded, gated, repeat_heads, split_heads
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer


class GatedLinearAttention(ValueMixer):
    """The layer of GLA: `linear_attention` with a decay ``α = σ(W₂ W₁ x + b)^{1/16}`` of each channel of the keys, a norm
    of each head's output, and a SiLU gate on it.

    Args:
        dim: of the tokens.
        heads: of queries.
        num_kv_heads: of keys, decays and values, which divides `heads`; as many by default.
        expand_k: queries of all heads together are so many times as wide as the tokens.
        expand_v: and values.
        use_short_conv: have queries, keys and values go through short convolutions and SiLU.
        conv_size: tokens that the short convolutions see.
        conv_bias: whether they have a bias.
        use_output_gate: multiply the normed output by ``SiLU(W x)``.
        gate_low_rank_dim: of W₁ x.
        gate_logit_normalizer: the 16.
        norm_eps: of the norm.

    Raises:
        ValueError: heads that do not divide the expanded widths, or one another; a rank or normaliser that is not above 0.

    S. Yang et al. (2023), Gated Linear Attention Transformers with Hardware-Efficient Training.

    >>> import torch
    >>> mixer, x = GatedLinearAttention(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> y.shape, state.tensors["memory"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 4, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="S. Yang et al. (2023), Gated Linear Attention Transformers with Hardware-Efficient Training",
        formula="S_i = diag(α_i) S_{i−1} + k_i v_iᵀ,  o_i = S_iᵀ q_i / √D,  α = σ(W₂ W₁ x + b)^{1/16}",
        time="O(N D²/H)",
        state="D²/(2 H)",
    )

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        name = type(self).__name__
        for what, size in (("gate_low_rank_dim", gate_low_rank_dim), ("gate_logit_normalizer", gate_logit_normalizer)):
            if size <= 0:
                raise ValueError(f"{name}: {what} must be above 0, got {size}")
        self.heads, self.num_kv_heads = heads, heads if num_kv_heads is None else num_kv_heads
        check_groups(name, ("num_kv_heads", self.num_kv_heads), ("heads", heads))
        self.gate_logit_normalizer = gate_logit_normalizer
        key_width, value_width = expanded(name, dim, expand_k, heads), expanded(name, dim, expand_v, heads)
        shared_keys, shared_values = (width // heads * self.num_kv_heads for width in (key_width, value_width))
        self.q_proj = Linear(dim, key_width, bias=False)
        self.k_proj = Linear(dim, shared_keys, bias=False)
        self.v_proj = Linear(dim, shared_values, bias=False)
        self.conv1d = (
            ShortConvolution(key_width + shared_keys + shared_values, conv_size, conv_bias) if use_short_conv else None
        )
        self.gk_proj = Sequential(Linear(dim, gate_low_rank_dim, bias=False), Linear(gate_low_rank_dim, shared_keys))
        self.g_proj = Linear(dim, value_width, bias=False) if use_output_gate else None
        self.norm = RMSNorm(value_width // heads, eps=norm_eps)
        self.o_proj = Linear(value_width, dim, bias=False)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries, and for each of their heads keys, values and log α, 0 for padding."""
        before = None if state is None or self.conv1d is None else state["tail"]
        projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        (query, key, value), tail = convolved_parts(projected, self.conv1d, before, layout.mask)
        logits = self.gk_proj(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        decay = functional.logsigmoid(logits) / self.gate_logit_normalizer
        if layout.mask is not None:  # behind a convolution, padding is no longer zeros
            key, decay = key * layout.mask[..., None], decay * layout.mask[..., None]
        key, value, decay = (
            repeat_heads(split_heads(part, self.num_kv_heads), self.heads) for part in (key, value, decay)
        )
        query = split_heads(query, self.heads)
        query = query * query.shape[3] ** -0.5
        return Projected(value, {"query": query, "key": key, "log_decay": decay, "x": x}, tail)

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Linear attention with a decay for each channel."""
        mixed, after = linear_attention(
            projected["query"], projected["key"], projected.value, projected["log_decay"],
            None if state is None else state["memory"],
        )  # fmt: skip
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, gated where there is a gate, and the output's projection."""
        y: Tensor = self.o_proj(gated(self.norm(mixed), projected["x"], self.g_proj))
        return y

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = α, b = k, c = q``."""
        projected = self.project(x)
        return DynamicalSystem(projected["log_decay"].exp(), projected["key"], projected["query"])
