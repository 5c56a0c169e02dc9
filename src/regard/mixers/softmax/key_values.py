"""What mixers share whose state is all keys and values: projections, the growing state, positions of real tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Linear

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer


def positions_of(real: Tensor | None, length: int, device: torch.device) -> Tensor:
    """How many real tokens precede each of ``length``, (B or 1, length)."""
    if real is None:
        return torch.arange(length, device=device)[None]
    return (real.cumsum(1) - 1).clamp(min=0)


class KeyValueMixer(ValueMixer):
    """Queries, keys and values by one projection, a state of all keys and values so far, and a projection of what is mixed.

    Padding stays where it is, also in the state, marked: rows of a batch may hold different numbers of real tokens. A
    subclass writes `combine`, and `place` where keys are stored with their positions.
    """

    in_pieces = False
    padding_first = False

    def __init__(self, dim: int, heads: int, causal: bool = True) -> None:
        super().__init__(dim)
        check_divides(type(self).__name__, dim, heads)
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = Linear(dim, dim, bias=False)

    def place(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New queries, keys and values (B, H, N, D) at their positions (B or 1, N), as the state holds them."""
        return query, key, value

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """The queries of the tokens, and all keys and values that they may look at, ``real`` (B, M) or padding."""
        (query,) = heads_of(x, self.heads, self.q_proj)
        if layout.cross:
            return _seen(query, *self._of_context(state, layout))
        key, value = heads_of(x, self.heads, self.k_proj, self.v_proj)
        before = 0 if state is None else state["key"].shape[2]
        real = None if state is None else state.get("real")
        if layout.mask is not None or real is not None:
            real = torch.ones(len(x), before, dtype=torch.bool, device=x.device) if real is None else real
            real = torch.cat([real, real.new_ones(x.shape[:2]) if layout.mask is None else layout.mask], dim=1)
        positions = positions_of(real, before + x.shape[1], x.device)[:, before:]
        query, key, value = self.place(query, key, value, positions)
        if state is not None:
            key, value = torch.cat([state["key"], key], dim=2), torch.cat([state["value"], value], dim=2)
        return _seen(query, key, value, real)

    def _of_context(self, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the context, which has no place among the tokens, and which of them are real."""
        if layout.context is not None:
            key, value = heads_of(layout.context, self.heads, self.k_proj, self.v_proj)
            return key, value, layout.context_mask
        held = state or {}
        return held["key"], held["value"], held.get("real")

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The output's projection."""
        y: Tensor = self.o_proj(join_heads(mixed))
        return y

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = 1, b_i = e_i``, c_i row i of `map`: a slot for each token, hence a state as large as the text."""
        self._check_causal()
        rows = self.map(x).dense()
        slots = torch.eye(rows.shape[3], dtype=rows.dtype, device=rows.device)
        return DynamicalSystem(rows.new_ones(1, 1, 1, len(slots)), slots.expand_as(rows), rows)


def _seen(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Projected:
    """What one call sees, all of which the state keeps."""
    held = {"key": key} if real is None else {"key": key, "real": real}
    return Projected(value, {"query": query, **held}, {"value": value, **held})
