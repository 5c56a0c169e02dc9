"""How much attention each key receives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.tokens import Where, check_form, resolve
from regard.watch.statistic import Statistic


class Received(Statistic):
    """``Σ_i P_ij`` over queries: ``received(layer, batch, head, key)``; sums to the number of queries.

    Queries that ``token_mask`` calls padding do not count. Over the steps of ``generate`` it goes on adding up.

    Args:
        queries: the positions of the queries that count, as for `regard.Reweight`; all by default.
        name: of the variable, to watch several at once.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Received(queries=[3, 4])) as seen:
    ...     _ = layer(x, x, x)
    >>> [float(total.round(4)) for total in seen.dataset().received.sum("key").squeeze()]
    [2.0, 2.0]
    """

    dims = ("key",)
    places = ("queries",)

    def __init__(self, queries: Where | None = None, name: str = "received") -> None:
        check_form(queries, "queries")
        self.queries = queries
        self.name = name

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have it computed in the shared pass: (B, H, M)."""
        weights = query_weights(self.queries, attention, call)
        attention.expect("received", weights)
        return partial(attention.received, weights)


def query_weights(queries: Where | None, attention: TokenMap, call: Call) -> Tensor | None:
    """(B or 1, 1, N): 1 for queries that count, 0 for others; None where all count."""
    if queries is None and call.place.token_mask is None:
        return None
    device = attention.device
    batch, _, number, _ = attention.shape
    chosen = resolve(
        queries,
        call.place.query_start,
        number,
        batch=batch,
        token_ids=call.place.token_ids,
        device=device,
        what="queries",
    )[:, None]
    if call.place.token_mask is not None:
        chosen = chosen & call.place.token_mask[:, None].to(device)
    return chosen.float()
