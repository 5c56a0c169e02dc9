"""What every mixer is: a layer on (batch, tokens, dim) with a state that goes on."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from regard.maps import AttentionMap
from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.in_turn import in_turn
from regard.mixers.mixer_call import MixerCall
from regard.mixers.packed import unpack
from regard.mixers.state import State
from regard.runtime import HiddenCall, intercept, looked_at, read, unseen

_PIECE = 2048  # tokens of all texts together
_TRAINED = 512 * 1024  # numbers in the tokens of which all that the backward pass needs is stored at a time
_SMALLEST_PIECE = 256  # below, the pieces' number costs more than their size saves


@dataclass(frozen=True)
class Facts:
    """What one wants to know of a mechanism before choosing it; N tokens, width D, state in numbers for each text."""

    paper: str
    formula: str
    time: str
    state: str
    causal: bool = True
    bidirectional: bool = False
    cross: bool = False
    exact: bool = False
    """Whether it computes softmax attention."""

    @property
    def cited(self) -> str:
        """The paper by its first author's surname and its year.

        >>> Facts("A. Gu and T. Dao (2023), Mamba", "", "", "").cited
        'Gu et al. (2023)'
        """
        authors, year = self.paper.partition(")")[0].rsplit(" (", 1)
        first = re.split(", | and | et al", authors)[0]
        surname = first.rpartition(". ")[2]
        return f"{surname}{'' if first == authors else ' et al.'} ({year})"


class Mixer(Module, ABC):
    """A layer that mixes tokens: ``forward(x, state=None, mask=None) -> (y, state)``.

    ``x`` is (batch, tokens, dim) and so is ``y``. Given the state that a call returned, the next call goes on where that one
    ended: a prompt and then token by token is the same as all at once. ``mask`` (batch, tokens) tells real tokens
    from padding, on either side: padding leaves the state as it is, and its outputs are zeros. Of texts that are packed into
    one row, ``cu_seqlens`` (texts + 1) tells the borders, which nothing crosses: each has a state of its own.

    Where no gradients are wanted, a long text is read piece by piece, each from the state of the one before: what it takes
    beside x and y does not grow with the text, and stays in the processor's cache.

    `regard.watch` sees a layer that has a `HiddenMap` as one call with that map, whatever it holds, and of any other the
    calls of attention that are made in it.

    A subclass writes `mix` and states its `facts`.
    """

    facts: ClassVar[Facts]
    """Of the mechanism, for ``regard mixers``."""
    in_pieces: ClassVar[bool] = True
    """Whether reading in pieces costs no more than at once, as it does where the state is all tokens so far."""
    padding_first: ClassVar[bool] = True
    """Whether `mix` must have padding before the tokens."""
    causal: bool = True
    """Whether a token sees those up to it alone; otherwise all, and no call goes on from a state."""

    _arguments: Mapping[str, str]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keep what it is made of, by which it knows its own states."""
        mixer = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*arguments, **named)
        bound.apply_defaults()
        mixer.__dict__["_arguments"] = {name: repr(value) for name, value in bound.arguments.items()}
        return mixer

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be at least 1, got {dim}")
        self.dim = dim

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The mixed tokens, and the state after them; of packed texts, a row for each."""
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError(
                    f"{type(self).__name__} takes a mask or cu_seqlens, got both: packed texts have no padding"
                )
            texts, real = unpack(x, cu_seqlens)
            outputs, ends = self(texts, state, None if bool(real.all()) else real)
            return outputs[real][None], ends
        self._check(x, state, mask)
        if not (self.hides_map and looked_at()):
            return self._forward(x, state, mask)
        after: list[State] = []

        def finish(last: HiddenCall, _: HiddenCall) -> Tensor:
            read(last)
            with unseen():
                y, next_state = self._forward(x, state, mask)
            after.append(next_state)
            return y

        call = MixerCall(cache(lambda: self._hidden_map(x, state, mask)), x.shape[1], state)
        return intercept(call, finish, past=0 if state is None else state.seen), after[0]

    @property
    def hides_map(self) -> bool:
        """Whether `map` is a `HiddenMap`, by which this layer is watched, and not by the calls of attention within it."""
        return type(self).map is not Mixer.map

    def _forward(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """Mix the tokens, real ones brought to where `mix` wants them, whether anyone watches or not."""
        tensors = None if state is None else state.tensors
        seen = x.shape[1] + (0 if state is None else state.seen)
        if mask is None:
            y, after = self._read(x, tensors, None)
        elif self.padding_first:
            order = _stable_order(mask)
            left = mask.gather(1, order)
            y, after = self._read(_moved(x, order, left), tensors, left)
            y = torch.zeros_like(x).scatter(1, order[..., None].expand_as(y), y.masked_fill(~left[..., None], 0.0))
        else:
            y, after = self._read(x.masked_fill(~mask[..., None], 0.0), tensors, mask)
            y = y.masked_fill(~mask[..., None], 0.0)
        return y, self.state(after, seen, x.dtype)

    def state(self, tensors: Mapping[str, Tensor], seen: int, dtype: torch.dtype) -> State:
        """These tensors, as a state of this layer after so many tokens of a dtype."""
        return State(type(self).__name__, tensors, seen, dtype, self._arguments)

    def _hidden_map(self, x: Tensor, state: State | None, mask: Tensor | None) -> HiddenMap:
        """The map of the real tokens."""
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone() if x.is_inference() else x.detach()  # or autograd would refuse it, which transposes maps
            if mask is None:
                return self._own_map(x, state)
            if not self.causal:
                raise ValueError(
                    f"{type(self).__name__}(causal=False) is watched without padding only: run each text by itself, or leave "
                    "the layer out with layers="
                )
            # No token sees those after it: with padding last, real tokens have the map of a text without any.
            order = _stable_order(~mask)
            return self._own_map(_moved(x, order, mask.gather(1, order)), state).rearranged(order, mask)

    def _own_map(self, x: Tensor, state: State | None) -> HiddenMap:
        found = self.map(x, state)
        if not isinstance(found, HiddenMap):
            raise TypeError(f"{type(self).__name__} says that it hides a map, and its map is {type(found).__name__}")
        return found

    def _read(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`mix`, in pieces where that is better; each is mixed again for its gradients, so that one at a time is stored."""
        batch, tokens, dim = x.shape
        training = torch.is_grad_enabled()
        piece = max(_TRAINED // (batch * dim) if training else _PIECE // batch, _SMALLEST_PIECE)
        if tokens <= piece or not (self.in_pieces and self.causal):
            return self.mix(x, state, mask)
        texts = x.split(piece, dim=1)
        masks = [None] * len(texts) if mask is None else mask.split(piece, dim=1)
        if training:
            return self._read_again(list(zip(texts, masks, strict=True)), state)
        first, after = self.mix(texts[0], state, masks[0])
        y = first.new_empty(x.shape)  # pieces joined at the end would be held twice
        places = y.split(piece, dim=1)
        places[0].copy_(first)
        for text, real, place in zip(texts[1:], masks[1:], places[1:], strict=True):
            output, after = self.mix(text, after, real)
            place.copy_(output)
        return y, after

    def _read_again(
        self, parts: list[tuple[Tensor, Tensor | None]], state: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first piece by itself, after which it is known how large a state is."""

        def step(part: tuple[Tensor, Tensor | None], before: Mapping[str, Tensor] | None) -> tuple[Tensor, Any]:
            return self.mix(part[0], before, part[1])

        first, after = checkpoint(step, parts[0], state, use_reentrant=False)
        outputs, after = in_turn(step, parts[1:], after, sum(tensor.numel() for tensor in after.values()))
        return torch.cat([first, *outputs], dim=1), after

    @abstractmethod
    def mix(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix checked inputs (B, N, dim) after a state; where there is a mask, padding is zeros, first if it must be."""

    def decode(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token more, (batch, dim), after a state: its output (batch, dim), and the state after it."""
        if x.ndim != 2:
            raise ValueError(f"{type(self).__name__}.decode takes one token, (batch, dim), got {tuple(x.shape)}")
        y, after = self(x[:, None], state)
        return y[:, 0], after

    def map(self, x: Tensor, state: State | None = None) -> HiddenMap | AttentionMap:
        """The matrix by which values are mixed, (batch, heads, tokens, tokens), with `regard.AttentionMap`'s interface."""
        raise NotImplementedError(f"{type(self).__name__} mixes values by no matrix: its output is not linear in them")

    def system(self, x: Tensor) -> DynamicalSystem:
        """Its row of the dynamical-systems table for these tokens: `map` is what it hides."""
        raise NotImplementedError(
            f"{type(self).__name__} is no linear dynamical system: its state is not linear in values"
        )

    def _check(self, x: Tensor, state: State | None, mask: Tensor | None) -> None:
        name = type(self).__name__
        if x.ndim != 3 or x.shape[2] != self.dim or not x.shape[0] or not x.shape[1]:
            raise ValueError(
                f"{name} takes x of shape (batch, tokens, {self.dim}), at least one of each, got {tuple(x.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"{name} takes a boolean mask of shape {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if state is not None:
            self._check_state(x, state)

    def _check_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{type(self).__name__}(causal=False) is no dynamical system: what sees all tokens has no state on its way"
            )

    def _check_state(self, x: Tensor, state: State) -> None:
        name = type(self).__name__
        if not self.causal:
            raise ValueError(f"{name}(causal=False) goes on from no state: every token sees all others of its call")
        if not isinstance(state, State) or state.mixer != name:
            what = f"of {state.mixer}" if isinstance(state, State) else type(state).__name__
            raise ValueError(f"{name} goes on from a state of its own, got a state {what}")
        if state.arguments != self._arguments:
            pairs = {key: (self._arguments.get(key), state.arguments.get(key)) for key in self._arguments}
            own, other = (
                ", ".join(f"{key}={pair[side]}" for key, pair in pairs.items() if pair[0] != pair[1]) for side in (0, 1)
            )
            raise ValueError(f"{name}({own}) goes on from a state of its own, got that of {name}({other})")
        rows = {len(tensor) for tensor in state.tensors.values()}
        if rows - {x.shape[0]}:
            raise ValueError(f"{name} was given {x.shape[0]} texts, and a state of {', '.join(map(str, sorted(rows)))}")
        devices = {tensor.device for tensor in state.tensors.values()}
        if state.dtype != x.dtype or devices - {x.device}:
            found = ", ".join([str(state.dtype), *(str(device) for device in devices)])
            raise ValueError(
                f"{name} was given tokens of {x.dtype}, {x.device}, and a state of {found}: state.to(x.device, x.dtype) fits"
            )


def _stable_order(late: Tensor) -> Tensor:
    """Tokens (B, N) such that those marked come after the others."""
    return late.long().argsort(dim=1, stable=True)


def _moved(x: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Tokens (B, N, dim) in this order, zeros where they are then not real."""
    return x.gather(1, order[..., None].expand_as(x)).masked_fill(~real[..., None], 0.0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H·D) as (B, H, N, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def heads_of(x: Tensor, heads: int, *projections: Module) -> list[Tensor]:
    """What each projection gives of the tokens (B, N, dim), by heads: (B, H, N, D)."""
    return [split_heads(projection(x), heads) for projection in projections]


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H·D)."""
    return x.transpose(1, 2).flatten(2)


def check_divides(name: str, dim: int, heads: int) -> None:
    """Refuse heads that do not divide the width."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: dim must be a multiple of heads, got dim={dim} and heads={heads}")
