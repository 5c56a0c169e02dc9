"""Mega's gates, by which a layer weighs what a convolution and what attention found."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Linear, Module, functional


class MegaGate(Module):
    """``y = σ(W_u z + b) ∘ (W_h z + W_o (SiLU(W_r z) ∘ o))``, from the convolution's z and the attention's o.

    Both are (B, N, dim), and so is y. Mega's reset and update gates; the residual connection, which the update gate there
    weighs too, is the block's.

    X. Ma et al. (2023), Mega: Moving Average Equipped Gated Attention.

    >>> import torch
    >>> z, o = torch.randn(2, 1, 10, 8)
    >>> MegaGate(8)(z, o).shape
    torch.Size([1, 10, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reset = Linear(dim, dim, bias=False)
        self.update = Linear(dim, dim)
        self.pass_on = Linear(dim, dim, bias=False)
        self.o_proj = Linear(dim, dim, bias=False)

    def forward(self, convolved: Tensor, mixed: Tensor) -> Tensor:
        """The two as one."""
        gated = self.o_proj(functional.silu(self.reset(convolved)) * mixed)
        y: Tensor = self.update(convolved).sigmoid() * (self.pass_on(convolved) + gated)
        return y
