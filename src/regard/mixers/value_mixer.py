"""Mixers in three steps: tokens are projected, values are combined, and what comes out is projected again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from regard.maps import AttentionMap
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import Mixer
from regard.mixers.mixer_call import MixerCall
from regard.mixers.projected import Projected
from regard.mixers.state import State
from regard.runtime import HiddenCall, intercept, looked_at, read, unseen


class ValueMixer(Mixer):
    """A mixer whose output is ``out(combine(project(x)))``, where `combine` is linear in values: that is its map.

    `regard.watch` sees such a layer as one call with that map, whatever it holds. A subclass writes the three steps, and
    `without_values` where what came before the text counts in its rows.
    """

    @abstractmethod
    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Values, what mixes them, and what the output needs besides, of tokens (B, N, dim)."""

    @abstractmethod
    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The values mixed, (B, H, N, Dv), linear in them, and what the state holds of them afterwards."""

    @abstractmethod
    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The layer's output (B, N, dim), of mixed values (B, H, N, Dv)."""

    def mix(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """The three steps one after another."""
        return self._mixed(self.project(x, state, layout), state, layout)

    def map(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        grid: Sequence[int] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> HiddenMap | AttentionMap:
        """The matrix by which values are mixed, (batch, heads, tokens, tokens), with `regard.AttentionMap`'s interface.

        After a state, it tells of the tokens of this call, not of those before.
        """
        layout = self._layout(x, state, None, grid, context, context_mask)
        tensors = None if state is None else state.tensors
        return self.map_of(self.project(x, tensors, layout), tensors, layout)

    def map_of(
        self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout
    ) -> HiddenMap | AttentionMap:
        """The matrix by which what was projected is combined."""
        return self.hidden_map(projected, state, layout)

    def hidden_map(self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout) -> HiddenMap:
        """`combine` as an operator on values."""

        def apply(values: Tensor) -> Tensor:
            before = None if state is None else self.without_values(state, values.shape[3])
            return self.combine(projected.with_value(values), before, layout)[0]

        batch, heads, keys, _ = projected.value.shape
        return HiddenMap(apply, (batch, heads, self.queries(projected), keys), projected.value)

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor] | None:
        """The state as if what came before had values of zero, of this width; None where nothing then counts."""
        return None

    def queries(self, projected: Projected) -> int:
        """N, the tokens of the call."""
        return projected["query"].shape[2]

    @property
    def hides_map(self) -> bool:
        """Whether it is watched by its map, and not by the calls of attention within it."""
        return True

    def _run(self, x: Tensor, state: State | None, layout: Layout) -> tuple[Tensor, State]:
        """Mix the tokens, as one call of this layer where anyone watches."""
        if not (self.hides_map and looked_at()):
            return super()._run(x, state, layout)
        call = _WatchedCall(self, x, state, layout)
        after: list[State] = []

        def finish(last: HiddenCall, _: HiddenCall) -> Tensor:
            read(last)
            with unseen():
                y, next_state = call.run()
            after.append(next_state)
            return y

        before = None if layout.cross else state
        return intercept(
            MixerCall(call.map, x.shape[1], before), finish, past=0 if before is None else before.seen
        ), after[0]

    def _mixed(
        self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, after = self.combine(projected, state, layout)
        return self.out(mixed, projected), {**after, **projected.after}


class _WatchedCall:
    """One call of a layer while somebody watches: what its map and its output both need is made once."""

    def __init__(self, mixer: ValueMixer, x: Tensor, state: State | None, layout: Layout) -> None:
        self.mixer, self.x, self.state, self.given = mixer, x, state, layout
        self.tensors = None if state is None else state.tensors
        self.arranged, self.layout, self.order = mixer._arranged(x, layout)
        self.projected: Projected | None = None
        self.gradients, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.map = cache(self._map)

    def _map(self) -> HiddenMap:
        """The map of the real tokens, zero in the rows and columns of padding."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.gradients),
        ):  # the output's, not the reader's
            self.projected = self.mixer.project(self.arranged, self.tensors, self.layout)
        with torch.inference_mode(False), torch.no_grad():
            found = self.mixer.hidden_map(self.projected.constant(), self.tensors, self.layout)
            mask = self.given.mask
            if mask is None:
                return found
            if self.layout.cross:
                return _with_rows(found, mask)
            order = (
                torch.arange(self.x.shape[1], device=mask.device).expand_as(mask) if self.order is None else self.order
            )
            return found.rearranged(order, mask)

    def run(self) -> tuple[Tensor, State]:
        """The output and the state, of what the map was made from, unless the text is to be read in pieces."""
        mixer, whole = self.mixer, self.projected
        if whole is None or self.x.shape[1] > mixer._piece(self.x, self.layout):
            y, after = mixer._read(self.arranged, self.tensors, self.layout)
        else:
            y, after = mixer._mixed(whole, self.tensors, self.layout)
        return mixer._finished(y, after, self.x, self.state, self.given, self.order)


def _with_rows(found: HiddenMap, real: Tensor) -> HiddenMap:
    """The map with zeros in the rows of queries (B, N) that are not real."""
    return HiddenMap(
        lambda values: (found @ values).masked_fill(~real[:, None, :, None], 0.0), found.shape, found.values
    )
