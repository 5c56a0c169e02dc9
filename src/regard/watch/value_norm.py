"""What attention carries, not only where it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.received import query_weights
from regard.watch.statistic import Statistic

if TYPE_CHECKING:
    import xarray


class ValueNorm(Statistic):
    """Attention weighed by the values that it moves.

    ``value_norm(layer, batch, head, query)`` is ``‖(P V)_i‖``, and ``value_share(layer, batch, head, key)`` each key's part
    in all that is moved, ``Σ_i P_ij ‖v_j‖`` over the sum of it for all keys: a sink with a tiny value has next to none.

    G. Kobayashi et al. (2020), Attention is Not Only a Weight: Analyzing Transformers with Vector Norms.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.ValueNorm()) as seen:
    ...     _ = layer(x, x, x)
    >>> [float(total.round(4)) for total in seen.dataset().value_share.sum("key").squeeze()]
    [1.0, 1.0]
    """

    name = "value_norm"
    dims = ("query",)
    units = "norm of the head's output"

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Mapping[str, Tensor]]:
        """Have both sides computed in the shared pass: norms by query; by key, what is moved."""
        weights = query_weights(None, attention, call)
        values = call.value.detach().to(attention.dtype)
        attention.expect("product", values)
        attention.expect("received", weights)

        def take() -> Mapping[str, Tensor]:
            norms = torch.linalg.vector_norm(values, dim=-1)
            norms = norms.repeat_interleave(attention.shape[1] // norms.shape[1], dim=1)
            return {
                "value_norm": torch.linalg.vector_norm(attention @ values, dim=-1),
                "value_share": attention.received(weights) * norms,
            }

        return take

    def dimensions(self) -> Mapping[str, tuple[str, ...]]:
        """One by query, one by key."""
        return {"value_norm": ("query",), "value_share": ("key",)}

    def finish(self, variables: xarray.Dataset) -> xarray.Dataset:
        """From amounts to shares."""
        moved = variables["value_share"]
        return variables.assign(value_share=moved / moved.sum("key"))
