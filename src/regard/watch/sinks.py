"""Keys that collect attention whatever the query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.received import query_weights
from regard.watch.statistic import Statistic

if TYPE_CHECKING:
    import xarray


class Sinks(Statistic):
    """Tokens that receive more than a threshold's share, on the mean over the queries that can see them.

    ``sink_share(layer, batch, head, key)`` is ``Σ_i P_ij / |{i that see j}|`` and ``sinks`` is 1 where it exceeds the
    threshold, 0 elsewhere: the definition of X. Gu et al. (2024), When Attention Sink Emerges in Language Models.

    Args:
        threshold: the least mean share of a sink, in (0, 1).

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Sinks(threshold=0.9)) as seen:
    ...     _ = layer(x, x, x)
    >>> float(seen.dataset().sinks.sum())
    0.0
    """

    name = "sinks"
    dims = ("key",)

    def __init__(self, threshold: float = 0.3) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"Sinks needs a threshold between 0 and 1, got {threshold}")
        self.threshold = threshold

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Mapping[str, Tensor]]:
        """Have it computed in the shared pass: what each key receives, and from how many queries it could."""
        weights = query_weights(None, attention, call)
        attention.expect("received", weights)

        def take() -> Mapping[str, Tensor]:
            received = attention.received(weights)
            return {"sink_share": received, "sinks": attention.viewers(weights).expand_as(received)}

        return take

    def dimensions(self) -> Mapping[str, tuple[str, ...]]:
        """Both go by key."""
        return {"sink_share": self.dims, "sinks": self.dims}

    def finish(self, variables: xarray.Dataset) -> xarray.Dataset:
        """From sums to shares."""
        viewers = variables["sinks"]
        share = (variables["sink_share"] / viewers.where(viewers > 0, numpy.nan)).where(viewers > 0, 0.0)
        share = share.where(viewers.notnull())
        return variables.assign(
            sink_share=share, sinks=(share > self.threshold).astype("float32").where(share.notnull())
        )
