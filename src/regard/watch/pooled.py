"""The picture of a map too large to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from regard.maps import TokenMap, one_hot, sum_rows
from regard.runtime import Call
from regard.watch.statistic import Statistic


class Pooled(Statistic):
    """The map summed over blocks of tokens: ``pooled(layer, batch, head, row, column)``.

    Block r holds the tokens r·size … (r+1)·size − 1, and a row of blocks sums to the number of its queries. Queries that
    ``token_mask`` calls padding do not count. In ``generate`` the picture grows at its lower edge.

    Args:
        size: the side of a block, in tokens.
        columns: the other side of it, in keys, where one sequence looks at another of another length; by default as ``size``.

    Raises:
        ValueError: blocks of less than one token.

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

    def __init__(self, size: int, columns: int | None = None) -> None:
        if min(size, 1 if columns is None else columns) < 1:
            raise ValueError(
                f"Pooled needs blocks of at least 1 token, got {size if columns is None else (size, columns)}"
            )
        self.size = size
        self.columns = size if columns is None else columns

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have the columns' sums computed in the shared pass."""
        blocks = self._blocks(call.place.key_start, attention.shape[3], self.columns, attention)
        columns = one_hot(blocks, int(blocks[-1]) + 1, attention.dtype)
        attention.expect("product", columns)
        return lambda: self._sum_rows(attention @ columns, attention, call)

    def _sum_rows(self, product: Tensor, attention: TokenMap, call: Call) -> Tensor:
        """(B, H, rows, columns), from the blocks of the text's first token on."""
        if call.place.token_mask is not None:
            product = product * call.place.token_mask.to(product.device)[:, None, :, None]
        blocks = self._blocks(call.place.query_start, attention.shape[2], self.size, attention)
        return sum_rows(product, blocks, int(blocks[-1]) + 1)

    def attributes(self) -> Mapping[str, object]:
        """The units, and the sides of a block."""
        return {"units": "sum of attention", "size": self.size, "columns": self.columns}

    @staticmethod
    def _blocks(start: int, tokens: int, size: int, attention: TokenMap) -> Tensor:
        return torch.arange(start, start + tokens, device=attention.device) // size
