"""The keys that each query looks at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nan
from torch.nn.functional import pad

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.statistic import Statistic

if TYPE_CHECKING:
    import xarray


class TopK(Statistic):
    """The k largest shares of each query and their keys: ``topk_share`` and ``topk_key(layer, batch, head, query, rank)``.

    Where a query sees fewer than k keys, the rest is NaN.

    Args:
        k: how many, at least 1.

    Raises:
        IndexError: at the end, where no query saw as many keys as k.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.TopK(2)) as seen:
    ...     _ = layer(x, x, x)
    >>> dict(seen.dataset().topk_key.sizes)
    {'layer': 1, 'batch': 1, 'head': 2, 'query': 5, 'rank': 2}
    """

    name = "topk"
    dims = ("query", "rank")

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"TopK needs k of at least 1, got {k}")
        self.k = k

    def measure(self, attention: TokenMap, call: Call) -> Mapping[str, Tensor]:
        """Shares and keys, (B, H, N, k) each."""
        best = attention.topk(min(self.k, attention.shape[3]))
        none = best.keys < 0
        missing = (0, self.k - best.keys.shape[-1])
        keys = (best.keys + call.place.key_start).to(attention.dtype)
        return {
            "topk_share": pad(best.shares.masked_fill(none, nan), missing, value=nan),
            "topk_key": pad(keys.masked_fill(none, nan), missing, value=nan),
        }

    def dimensions(self) -> Mapping[str, tuple[str, ...]]:
        """Both go by query and rank."""
        return {"topk_share": self.dims, "topk_key": self.dims}

    def finish(self, variables: xarray.Dataset) -> xarray.Dataset:
        """Refuse ranks that no query has: there is nothing in them."""
        seen = int(variables["topk_key"].notnull().sum("rank").max())
        if seen < self.k:
            raise IndexError(f"TopK: k is {self.k}, but no query saw more than {seen} keys")
        return variables

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """Ranks from 0."""
        return {"rank": list(range(self.k))}
