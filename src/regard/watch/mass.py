"""How much attention goes to named sets of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from regard.maps import KeySets, TokenMap
from regard.runtime import Call, Place
from regard.tokens import Where, check_form, resolve
from regard.watch.statistic import Statistic


class Mass(Statistic):
    """``Σ_{j in segment} P_ij``: ``mass(layer, batch, head, query, segment)``.

    Args:
        segments: names to keys: positions of the text, as for `regard.Reweight`; in ``generate`` they go on to mean the same
            tokens.
        name: of the variable, to watch several at once.

    Raises:
        IndexError: at the end of a block in which no text had a segment's keys.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Mass({"sink": [0], "rest": slice(1, 5)})) as seen:
    ...     _ = layer(x, x, x)
    >>> [float(mass.round(4)) for mass in seen.dataset().mass.sum("segment").mean("query").squeeze()]
    [1.0, 1.0]
    """

    dims = ("query", "segment")
    places = ("segments",)

    def __init__(self, segments: Mapping[str, Where], name: str = "mass") -> None:
        if not isinstance(segments, Mapping) or not segments:
            raise ValueError(f'Mass needs a mapping from names to keys, such as {{"sink": [0]}}, got {segments!r}')
        for segment, where in segments.items():
            check_form(where, f"segment {segment!r}")
        self.segments = dict(segments)
        self.name = name

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have it computed in the shared pass: (B, H, N, S)."""
        batch, _, _, keys = attention.shape
        place = call.place

        def make() -> tuple[KeySets, Mass]:
            return KeySets({name: self._of_call(name, place, keys, batch) for name in self.segments}), self

        segments, _ = place.remember(("mass", id(self), place.key_start, keys, batch), make)
        attention.expect("mass", segments)
        return partial(attention.mass, segments)

    def _of_call(self, name: str, place: Place, keys: int, batch: int) -> Tensor:
        """A segment as a mask over the keys that the call has: (M,) or (B, M)."""
        where, ids = self.segments[name], place.token_ids
        mask = resolve(where, place.key_start, keys, batch=batch, token_ids=ids, what=f"segment {name!r}")
        return mask[0] if len(mask) == 1 else mask

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """The segments' names."""
        return {"segment": list(self.segments)}
