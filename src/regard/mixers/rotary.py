"""Rotary positions: pairs of features turned by an angle that grows with the token's position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, rates: Tensor) -> Tensor:
    """``(x_m, x_{m + D/2})``, turned by ``position · rate_m``.

    Args:
        x: (B, H, N, D), D even.
        positions: (B or 1, N).
        rates: (D/2,), or (H, D/2) with rates for each head.

    Returns:
        (B, H, N, D), in the dtype of x.

    J. Su et al. (2021), RoFormer.

    >>> import torch
    >>> q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    >>> rates, positions = rotary_rates(8, 10_000.0), torch.arange(5)[None]
    >>> one = rotate(q, positions, rates) @ rotate(k, positions, rates).mT
    >>> other = rotate(q, positions + 7, rates) @ rotate(k, positions + 7, rates).mT
    >>> bool(torch.allclose(one, other))  # distances alone matter
    True
    """
    rates = rates.double().reshape(-1, 1, x.shape[3] // 2)
    # In float32 the angles of a few thousand tokens would be off by a thousandth of a turn.
    angles = positions.double()[:, None, :, None] * rates
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotary_rates(dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """``base^(−2m/D)``, (D/2,), in float64."""
    return base ** (-torch.arange(dim // 2, device=device, dtype=torch.float64) / (dim // 2))


def check_rotary(name: str, dim: int, heads: int) -> None:
    """Refuse heads whose features do not pair up."""
    if dim // heads % 2:
        raise ValueError(
            f"{name}: pairs of features are turned, which needs an even head dimension; "
            f"dim={dim} and heads={heads} make it {dim // heads}"
        )
