"""What a layer of the model was given and made in the pass after which a policy chooses; computed for policies that ask."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.window import Window
from regard.runtime import AttentionCall

_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class ModuleCall:
    """The call of attention of a layer, its module, and the ``last`` queries of calls before it, as the policy had them kept.

    ``text`` (batch, seen) tells real tokens from padding, None if there is none. The last ``removed`` tokens of the call were
    taken back since.
    """

    call: AttentionCall
    seen: int
    text: Tensor | None
    is_latent: bool = False
    removed: int = 0
    windows: list[Window] = field(default_factory=list)
    last: int = 0

    @cached_property
    def module(self) -> Module:
        """The module of attention."""
        if not self.call.place.frames:
            raise ValueError(f"{self.call.place.path}: the module that made the call is not known")
        return self.call.place.frames[0].module

    @cached_property
    def hidden_states(self) -> Tensor:
        """(batch, new tokens, width): what the module was given."""
        frame = self.call.place.frames[0]
        given = [frame.arguments.get("hidden_states"), *frame.positional[:1]]
        found = next((one for one in given if isinstance(one, Tensor) and one.ndim == 3), None)
        if found is None:
            raise ValueError(f"{type(frame.module).__name__} was given no hidden_states")
        return found[:, : found.shape[1] - self.removed]

    @cached_property
    def queries(self) -> Tensor:
        """(batch, query heads, n, width): of a prompt or a turn; while decoding, the last ones that the policy has kept."""
        if self._goes_back:
            return torch.cat([window.query for window in self.windows], dim=2)[:, :, -self.last :]
        return self.call.query[:, :, : self.call.query.shape[2] - self.removed]

    @cached_property
    def query_positions(self) -> Tensor:
        """(batch, n): where in the text the queries stand, −1 for those of padding."""
        batch, device = len(self.call.query), self.call.query.device
        if self._goes_back:
            return torch.cat([window.places(batch) for window in self.windows], dim=1)[:, -self.last :]
        positions = torch.arange(self.seen - self.queries.shape[2], self.seen, device=device).expand(batch, -1)
        return positions if self.text is None else positions.masked_fill(~self.text[:, -positions.shape[1] :], -1)

    @cached_property
    def query_ranks(self) -> Tensor:
        """(batch, n): how many real tokens stand before each query, −1 for those of padding."""
        positions = self.query_positions
        if self.text is None:
            return positions
        before = (self.text.long().cumsum(dim=1) - 1).gather(1, positions.clamp(min=0))
        return before.masked_fill(positions < 0, -1)

    @property
    def _goes_back(self) -> bool:
        return self.call.query.shape[2] - self.removed == 1 and len(self.windows) > 1

    @cached_property
    def output_weight(self) -> Tensor:
        """(query heads, width of a value, hidden width): the part of each head in the output projection."""
        found = next((getattr(self.module, name) for name in _OUTPUTS if hasattr(self.module, name)), None)
        weight = getattr(found, "weight", None)
        if weight is None:
            raise ValueError(
                f"{type(self.module).__name__} has no output projection by one of the names {', '.join(_OUTPUTS)}"
            )
        heads, width = self.call.query.shape[1], self.call.value.shape[3]
        weight = weight if type(found).__name__ == "Conv1D" else weight.T
        if weight.shape[0] != heads * width:
            raise ValueError(
                f"{type(self.module).__name__}: the output projection takes {weight.shape[0]} numbers, not {heads} heads "
                f"of {width}"
            )
        parts: Tensor = weight.detach().unflatten(0, (heads, width))
        return parts

    def rotation(self, places: Tensor) -> Rotation | None:
        """How the model turns queries and keys at places (batch, n) of a text; None for one without rotary positions."""
        holders = [frame.module for frame in self.call.place.frames if hasattr(frame.module, "rotary_emb")]
        if not holders:
            config: Any = getattr(self.module, "config", None)
            if any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rotary_dim")):
                raise ValueError(f"{type(self.module).__name__}: its rotary embedding was not found as rotary_emb")
            return None
        if self.is_latent:
            raise ValueError(
                f"{type(self.module).__name__} turns a part of its latents only: its queries are not known unturned"
            )
        rotary: Any = holders[-1].rotary_emb
        further = {}
        if "layer_type" in inspect.signature(getattr(rotary, "forward", rotary)).parameters:
            further["layer_type"] = getattr(self.module, "layer_type", None)
        found = rotary(torch.zeros(1, device=places.device), places, **further)
        if not isinstance(found, tuple) or found[0].ndim != 3:
            raise ValueError(f"{type(self.module).__name__}: rotary positions other than of one axis are not known")
        return Rotation(*found)


@dataclass(frozen=True)
class Rotation:
    """Rotary positions as ``cos`` and ``sin`` (batch, n, turned width), of pairs side by side or half a width apart."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def _is_side_by_side(self) -> bool:
        half = self.cos.shape[-1] // 2
        if torch.equal(self.cos[..., :half], self.cos[..., half:]):
            return False
        if torch.equal(self.cos[..., 0::2], self.cos[..., 1::2]):
            return True
        raise ValueError(
            "the rotary embedding gives neither cosines of halves nor of neighbours, by which to turn a vector"
        )

    def mean(self) -> Rotation:
        """The mean of these turns."""
        return Rotation(self.cos.mean(dim=1, keepdim=True), self.sin.mean(dim=1, keepdim=True))

    def turn(self, vectors: Tensor) -> Tensor:
        """Vectors (batch, heads, n, width), turned; what is beyond the turned width stays."""
        return self._turned(vectors, self.cos, self.sin)

    def undo(self, vectors: Tensor) -> Tensor:
        """Vectors that were turned so, as they were before."""
        square = self.cos**2 + self.sin**2  # 1, except where the embedding scales
        return self._turned(vectors, self.cos / square, -self.sin / square)

    def _turned(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        own, rest = vectors[..., :width], vectors[..., width:]
        if self._is_side_by_side:
            across = torch.stack([-own[..., 1::2], own[..., 0::2]], dim=-1).flatten(-2)
        else:
            across = torch.cat([-own[..., width // 2 :], own[..., : width // 2]], dim=-1)
        turned = own * cos[:, None] + across * sin[:, None]
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
