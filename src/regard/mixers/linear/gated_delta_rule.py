"""The gated delta rule: a memory that replaces, and that forgets."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from regard.mixers.forms import softplus
from regard.mixers.linear._delta_rule import DeltaRule
from regard.mixers.mixer import Facts, without_weight_decay


class GatedDeltaRule(DeltaRule):
    """The layer of Gated DeltaNet: `DeltaRule` with ``log α = −exp(a) · softplus(W x + b)`` and a SiLU gate on its output.

    exp(a) begins between 1 and 16 and softplus(b) between 0.001 and 0.1, so that heads remember for different times.

    Args:
        dim, heads, num_v_heads, head_dim, expand_v, use_short_conv, conv_size, conv_bias, allow_neg_eigval, norm_eps: as in
            `DeltaRule`.
        use_gate: multiply the normed output by ``SiLU(W x)``.

    Raises:
        ValueError: heads that do not divide the width, or one another.

    S. Yang, J. Kautz and A. Hatamizadeh (2025), Gated Delta Networks: Improving Mamba2 with Delta Rule.

    >>> import torch
    >>> y, state = GatedDeltaRule(32, heads=4)(torch.randn(2, 10, 32))
    >>> y.shape, state.tensors["memory"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 8, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="S. Yang, J. Kautz and A. Hatamizadeh (2025), Gated Delta Networks: Improving Mamba2 with Delta Rule",
        formula="S_i = α_i (I − β_i k_i k_iᵀ) S_{i−1} + β_i k_i v_iᵀ,  o_i = S_iᵀ q_i / √D,  β = σ(W x)",
        time="O(N D²/H)",
        state="D²/H + 3 (K − 1) D",
    )

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            dim, heads, num_v_heads=num_v_heads, head_dim=head_dim, expand_v=expand_v, use_gate=use_gate,
            use_short_conv=use_short_conv, conv_size=conv_size, conv_bias=conv_bias, allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
        )  # fmt: skip
        self.a_proj = Linear(dim, self.num_v_heads, bias=False)
        self.A_log = without_weight_decay(Parameter(torch.empty(self.num_v_heads).uniform_(1, 16).log()))
        step = torch.empty(self.num_v_heads).uniform_(-6.9, -2.3).exp()
        self.dt_bias = without_weight_decay(Parameter(step.expm1().log()))  # the inverse of softplus

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """β and log α, (B, H, N)."""
        dtype = torch.promote_types(
            x.dtype, torch.float32
        )  # in half precision, decays near 1 would be one and the same
        step = softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        return super()._gates(x) | {"log_decay": (-self.A_log.to(dtype).exp() * step).mT}
