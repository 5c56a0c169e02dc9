"""How far each query looks."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.statistic import Statistic


class MeanDistance(Statistic):
    """``Σ_j P_ij |i − j|``, in tokens: ``mean_distance(layer, batch, head, query)``.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.MeanDistance()) as seen:
    ...     _ = layer(x, x, x)
    >>> bool((seen.dataset().mean_distance <= 4).all())
    True
    """

    name = "mean_distance"
    dims = ("query",)
    units = "tokens"

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have it computed in the shared pass: (B, H, N)."""
        starts = call.place.query_start, call.place.key_start
        attention.expect("mean_distance", *starts)
        return partial(attention.mean_distance, *starts)
