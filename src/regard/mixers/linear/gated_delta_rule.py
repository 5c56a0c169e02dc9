"""The gated delta rule: a memory that replaces, and that forgets."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, functional

from regard.mixers.linear._delta_rule import DeltaRule
from regard.mixers.mixer import Facts, join_heads
from regard.mixers.projected import Projected


class GatedDeltaRule(DeltaRule):
    """The layer of Gated DeltaNet: `DeltaRule` with ``log α = −exp(a) · softplus(W x + b)`` and a SiLU gate on its output.

    exp(a) begins between 1 and 16 and softplus(b) between 0.001 and 0.1, so that heads remember for different times.

    Args:
        dim: of the tokens.
        heads: that divide it.
        convolution: tokens that the short convolutions see.

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
        state="D²/H",
    )

    def __init__(self, dim: int, heads: int = 4, convolution: int = 4) -> None:
        super().__init__(dim, heads, convolution)
        self.a_proj = Linear(dim, heads, bias=False)
        self.A_log = Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(-6.9, -2.3).exp()
        self.dt_bias = Parameter(step.expm1().log())  # the inverse of softplus
        self.g_proj = Linear(dim, dim, bias=False)

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, gated, and the output's projection."""
        y: Tensor = self.o_proj(join_heads(self.norm(mixed)) * functional.silu(self.g_proj(projected["x"])))
        return y

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """β and log α, (B, H, N)."""
        decay = (-self.A_log.exp() * functional.softplus(self.a_proj(x) + self.dt_bias)).mT
        return super()._gates(x) | {"log_decay": decay}
