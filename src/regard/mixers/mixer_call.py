"""A mixer's call as blocks meet it: nothing of it is made before somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

from regard.mixers.hidden_map import HiddenMap
from regard.mixers.state import State
from regard.runtime import HiddenCall, Place, Reading


class MixerCall(HiddenCall):
    """A mixer's call, whose map and values are made once somebody asks: where no block wants it, it costs nothing.

    Args:
        made: the map; asked for more than once.
        queries: tokens of the call.
        state: from which it goes on, None at a text's beginning.
    """

    def __init__(self, made: Callable[[], HiddenMap], queries: int, state: State | None) -> None:
        def map_at(place: Place) -> HiddenMap:
            hidden = made()
            *_, own, keys = hidden.shape
            if state is not None and keys == own:
                raise ValueError(
                    f"{place.path} ({state.mixer}) goes on from a state, and its map tells of the {own} tokens of this call "
                    "alone, not of what they take from those before: run the whole text in one call, watch the first pass "
                    "alone with passes=[0], or leave the layer out with layers="
                )
            return hidden

        self.__dict__.update(made=made, queries=queries, map=map_at, place=Place(), readings=())

    @property
    def value(self) -> Tensor:
        """Which the map mixes."""
        values: Tensor = self.__dict__["made"]().values
        return values

    def at(self, place: Place) -> MixerCall:
        """This call, as it stands elsewhere."""
        return self._changed(place=place)

    def with_reading(self, reading: Reading) -> MixerCall:
        """With one more reading of the matrix."""
        return self._changed(readings=(*self.readings, reading))

    def heads(self, index: list[int]) -> HiddenCall:
        """The call with these heads alone."""
        return HiddenCall(self.value[:, index], self.queries, self.map, self.place, self.readings)

    def _changed(self, **changes: Any) -> MixerCall:
        other = copy(self)
        other.__dict__.update(changes)
        return other
