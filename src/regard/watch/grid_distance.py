"""How far each patch of an image looks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.statistic import Statistic


class GridDistance(Statistic):
    """``sqrt(Σ_j P_ij |x_i − x_j|² / Σ_j P_ij)``, in patches: ``grid_distance(layer, batch, head, query)``.

    The root of the mean square, over the keys that stand for patches: it needs but one product with a few columns, as
    ``|x_i − x_j|² = |x_i|² − 2 x_i·x_j + |x_j|²``. NaN for queries that stand for no patch.

    Args:
        patches: (tokens, 2), row and column of the patch that each token stands for, NaN for others.

    Raises:
        ValueError: patches of another shape.

    The mean distance that attention looks over an image is that of A. Dosovitskiy et al. (2021), An Image is Worth 16×16
    Words, figure 7, there without the square.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x, places = torch.randn(1, 6, 16), torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))
    >>> with torch.no_grad(), regard.watch(layer, regard.GridDistance(places)) as seen:
    ...     _ = layer(x, x, x)
    >>> bool((seen.dataset().grid_distance <= 5**0.5).all())
    True
    """

    name = "grid_distance"
    dims = ("query",)
    units = "patches"

    def __init__(self, patches: Tensor) -> None:
        if patches.ndim != 2 or patches.shape[1] != 2:
            raise ValueError(f"GridDistance needs patches of shape (tokens, 2), got {tuple(patches.shape)}")
        centre = patches.nanmean(dim=0)  # small numbers: what is subtracted below loses fewer digits
        self.patches = patches - centre

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have the moments of the places looked at computed in the shared pass."""
        keys = self._of(call.place.key_start, attention.shape[3], attention)
        there = ~keys.isnan().any(dim=1, keepdim=True)
        keys = keys.where(there, 0.0)
        columns = torch.cat([keys, keys.square().sum(1, keepdim=True), there.to(keys)], dim=1)[None, None]
        attention.expect("product", columns)
        return lambda: self._distance(
            attention @ columns, self._of(call.place.query_start, attention.shape[2], attention)
        )

    @staticmethod
    def _distance(moments: Tensor, own: Tensor) -> Tensor:
        """(B, H, N), from the sums of places, squares and ones (B, H, N, 4) and the queries' own places (N, 2)."""
        mean, square = moments[..., :2] / moments[..., 3:], moments[..., 2] / moments[..., 3]
        squared: Tensor = own.square().sum(1) - 2 * (mean * own).sum(-1) + square
        return squared.clamp(min=0).sqrt()

    def _of(self, start: int, tokens: int, attention: TokenMap) -> Tensor:
        own = self.patches[start : start + tokens].to(attention.device, attention.dtype)
        return torch.nn.functional.pad(own, (0, 0, 0, tokens - own.shape[0]), value=torch.nan)
