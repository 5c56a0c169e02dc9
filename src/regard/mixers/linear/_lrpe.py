"""Linearised relative positions: what queries and keys become so that their products turn with their distance."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """``[x ∘ cos a, x ∘ sin a]``, (…, 2 D), so that ``q · k`` becomes ``Σ_c q_c k_c cos(a_c − b_c)``.

    Args:
        x: (…, D).
        angles: of each channel of each token, broadcastable to x; in float32 at least, whatever x is.

    Z. Qin et al. (2023), Linearized Relative Positional Encoding.
    """
    return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)


def positions_after(start: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
    """Each token's place in its text, (B, N), counted from what was seen before; padding comes first, and counts nothing."""
    real = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
    places = real.cumsum(1) - 1
    return places if start is None else places + start[:, None]
