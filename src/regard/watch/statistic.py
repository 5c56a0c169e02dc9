"""The base of all statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from regard.maps import TokenMap
from regard.notation import written
from regard.runtime import Call
from regard.tokens import Where

if TYPE_CHECKING:
    import xarray


Measured = Tensor | Mapping[str, Tensor]


class Statistic:
    """Something read from the attention map of every watched call.

    A subclass sets ``name`` and ``dims`` and overrides `measure`, or `ask` to share a pass over the matrix with others; it
    keeps nothing of a call. Dimensions after batch and head are free; two names have
    a meaning: values along "query" are put one after another as ``generate`` adds tokens, and values without it are summed
    up over its steps, those along "key" key by key. A query that ``token_mask`` calls padding becomes NaN.

    ``attention`` is the `regard.AttentionMap` of a call or, for a linear mixer, its `regard.mixers.HiddenMap`, which answers
    the same questions but for entropy, logsumexp and viewers. ``call.place`` tells where it stands (path, layer, pass, the
    positions of its queries and keys, token ids), ``call.value`` which values it mixes.

    Example:
        >>> import torch, regard
        >>> class Confidence(regard.Statistic):
        ...     "The largest share that each query gives to one key."
        ...     name, dims = "confidence", ("query",)
        ...     def measure(self, attention, call):
        ...         return attention.max()
        >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
        >>> x = torch.randn(1, 5, 16)
        >>> with torch.no_grad(), regard.watch(layer, Confidence()) as seen:
        ...     _ = layer(x, x, x)
        >>> dict(seen.dataset().confidence.sizes)
        {'layer': 1, 'batch': 1, 'head': 2, 'query': 5}
    """

    name: str
    dims: tuple[str, ...]
    units: ClassVar[str] = "share of attention"
    places: ClassVar[tuple[str, ...]] = ()
    """The arguments that are positions in the text, or name several."""

    def __repr__(self) -> str:
        """The statistic as one would write it, without arguments left at their default."""
        return written(self)

    def named_positions(self) -> dict[str, Where]:
        """The chosen positions, by what errors call them."""
        named: dict[str, Where] = {}
        for name in self.places:
            given = getattr(self, name)
            if isinstance(given, Mapping):
                named |= {f"segment {key!r}": where for key, where in given.items()}
            elif given is not None:
                named[f"{type(self).__name__}: {name}"] = given
        return named

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Measured]:
        """Announce with ``attention.expect(…)`` what will be asked, and return what measures it once all have announced."""
        return partial(self.measure, attention, call)

    def measure(self, attention: TokenMap, call: Call) -> Measured:
        """The value, (batch, heads, *dims), or several by name."""
        raise NotImplementedError(f"{type(self).__name__} must override measure()")

    def coordinates(self) -> Mapping[str, Sequence[object]]:
        """Labels of the dimensions that are the statistic's own."""
        return {}

    def dimensions(self) -> Mapping[str, tuple[str, ...]]:
        """The dimensions of each variable that `measure` returns."""
        return {self.name: self.dims}

    def attributes(self) -> Mapping[str, object]:
        """What is noted beside the variables."""
        return {"units": self.units}

    def finish(self, variables: xarray.Dataset) -> xarray.Dataset:
        """Last computations, once all steps are joined: from the variables measured to those reported."""
        return variables
