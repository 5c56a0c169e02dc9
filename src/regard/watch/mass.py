"""How much attention goes to named sets of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from regard.runtime import Call
from regard.maps import TokenMap, Segment, Segments, positions
from regard.watch.statistic import Statistic


class Mass(Statistic):
    """``Σ_{j in segment} P_ij``: ``mass(layer, batch, head, query, segment)``.

    Args:
        segments: names to keys, each a position, several, a slice, or a boolean mask (M,) or (batch, M). Positions are
            those of the text; in ``generate`` they go on to mean the same tokens.
        name: of the variable, to watch several at once.

    Raises:
        IndexError: at a call whose keys end before a segment.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Mass({"sink": [0], "rest": slice(1, 5)})) as seen:
    ...     _ = layer(x, x, x)
    >>> [float(mass.round(4)) for mass in seen.dataset().mass.sum("segment").mean("query").squeeze()]
    [1.0, 1.0]
    """

    dims = ("query", "segment")

    def __init__(self, segments: Segments, name: str = "mass") -> None:
        if not isinstance(segments, Mapping) or not segments:
            raise ValueError(f'Mass needs a mapping from names to keys, such as {{"sink": [0]}}, got {segments!r}')
        self.segments = dict(segments)
        self.name = name

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have it computed in the shared pass: (B, H, N, S)."""
        try:
            segments = {name: _of_call(name, segment, call) for name, segment in self.segments.items()}
        except IndexError as error:
            raise IndexError(f"{error} at {call.place.path}; choose other segments, or other layers with layers=") from error
        attention.expect("mass", segments)
        return partial(attention.mass, segments)

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """The segments' names."""
        return {"segment": list(self.segments)}


def _of_call(name: str, segment: Segment, call: Call) -> Tensor:
    """A segment of the text as a mask over the keys that the call has: (M,) or (B, M)."""
    keys = call.value.shape[2]
    end = call.place.key_start + keys
    if isinstance(segment, Tensor) and segment.dtype == torch.bool and segment.ndim == 2:
        if segment.shape[1] > end:
            raise IndexError(f"segment {name!r} is a mask over {segment.shape[1]} keys, but there are {end}")
        return functional.pad(segment, (0, end - segment.shape[1]))[:, call.place.key_start :]
    mask = torch.zeros(end, dtype=torch.bool)
    mask[positions(segment, end, f"segment {name!r}", "keys")] = True
    return mask[call.place.key_start :]
