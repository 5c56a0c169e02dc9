"""The picture of a map too large to be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.calls import AttentionCall
from regard.maps import AttentionMap
from regard.watch.statistic import Statistic


class Pooled(Statistic):
    """The map summed over square blocks of tokens: ``pooled(layer, batch, head, row, column)``.

    Block r holds the tokens r·size … (r+1)·size − 1, and a row of blocks sums to the number of its queries. Queries that
    ``token_mask`` calls padding do not count. In ``generate`` the picture grows at its lower edge.

    Args:
        size: the side of a block, in tokens.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 10, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Pooled(4)) as seen:
    ...     _ = layer(x, x, x)
    >>> [float(total.round(3)) for total in seen.dataset().pooled.sum("column")[0, 0, 0]]
    [4.0, 4.0, 2.0]
    """

    name = "pooled"
    dims = ("row", "column")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"Pooled needs blocks of at least 1 token, got {size}")
        self.size = size

    def measure(self, attention: AttentionMap, call: AttentionCall) -> Tensor:
        """(B, H, rows, columns), from the blocks of the text's first token on."""
        _, _, queries, keys = attention.shape
        device = attention.device
        rows = torch.arange(call.query_start, call.query_start + queries, device=device) // self.size
        columns = torch.arange(call.key_start, call.key_start + keys, device=device) // self.size
        return attention.block_sums(rows, columns, call.token_mask)
