"""What every mixer of this folder is: a layer on (batch, tokens, dim) with a state that goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import AttentionMap
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.linear.dynamical_system import DynamicalSystem

_PIECE = 2048  # tokens of all texts together
_SMALLEST_PIECE = 256  # below, the pieces' number costs more than their size saves


@dataclass(frozen=True)
class State:
    """What a mixer remembers of the tokens so far: tensors with a row for each text, by name."""

    mixer: str
    tensors: Mapping[str, Tensor]
    seen: int

    @property
    def bytes(self) -> int:
        """What it takes for one text."""
        return sum(tensor.numel() * tensor.element_size() // max(len(tensor), 1) for tensor in self.tensors.values())


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


class Mixer(Module, ABC):
    """A layer that mixes tokens: ``forward(x, state=None, mask=None) -> (y, state)``.

    ``x`` is (batch, tokens, dim) and so is ``y``. Given the state that a call returned, the next call goes on where that one
    ended: a prompt and then token by token is the same as all at once. ``mask`` (batch, tokens) tells real tokens
    from padding, on either side: padding leaves the state as it is, and its outputs are zeros.

    Where no gradients are wanted, a long text is read piece by piece, each from the state of the one before: what it takes
    beside x and y does not grow with the text, and stays in the processor's cache.

    A subclass writes `mix` and states its `facts`.
    """

    facts: ClassVar[Facts]
    """Of the mechanism, for ``regard mixers``."""
    in_pieces: ClassVar[bool] = True
    """Whether reading in pieces costs no more than at once, as it does where the state is all tokens so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be at least 1, got {dim}")
        self.dim = dim

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """The mixed tokens, and the state after them."""
        self._check(x, state, mask)
        tensors = None if state is None else state.tensors
        seen = x.shape[1] + (0 if state is None else state.seen)
        if mask is None:
            y, after = self._read(x, tensors, None)
            return y, State(type(self).__name__, after, seen)
        order = mask.long().argsort(dim=1, stable=True)[..., None]  # padding first
        left = mask.gather(1, order[..., 0])
        moved = x.gather(1, order.expand_as(x)).masked_fill(~left[..., None], 0.0)
        y, after = self._read(moved, tensors, left)
        y = torch.zeros_like(x).scatter(1, order.expand_as(y), y.masked_fill(~left[..., None], 0.0))
        return y, State(type(self).__name__, after, seen)

    def _read(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`mix`, in pieces where that is better."""
        piece = max(_PIECE // max(len(x), 1), _SMALLEST_PIECE)
        if x.shape[1] <= piece or torch.is_grad_enabled() or not self.in_pieces:
            return self.mix(x, state, mask)
        texts = x.split(piece, dim=1)
        masks = [None] * len(texts) if mask is None else mask.split(piece, dim=1)
        y, after = self.mix(texts[0], state, masks[0])
        outputs = [y]
        for text, real in zip(texts[1:], masks[1:], strict=True):
            y, after = self.mix(text, after, real)
            outputs.append(y)
        return torch.cat(outputs, dim=1), after

    @abstractmethod
    def mix(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same on checked inputs; where there is a mask, padding comes first in each text, and is of zeros."""

    def decode(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token more, (batch, dim), after a state: its output (batch, dim), and the state after it."""
        if x.ndim != 2:
            raise ValueError(f"{type(self).__name__}.decode takes one token, (batch, dim), got {tuple(x.shape)}")
        y, after = self.forward(x[:, None], state)
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
        if x.ndim != 3 or x.shape[2] != self.dim or not x.shape[1]:
            raise ValueError(f"{name} takes x of shape (batch, tokens, {self.dim}), got {tuple(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"{name} takes a boolean mask of shape {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if state is None:
            return
        if not isinstance(state, State) or state.mixer != name:
            what = f"of {state.mixer}" if isinstance(state, State) else type(state).__name__
            raise ValueError(f"{name} goes on from a state of its own, got a state {what}")
        rows = {len(tensor) for tensor in state.tensors.values()}
        if rows - {x.shape[0]}:
            raise ValueError(f"{name} was given {x.shape[0]} texts, and a state of {', '.join(map(str, sorted(rows)))}")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H·D) as (B, H, N, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H·D)."""
    return x.transpose(1, 2).flatten(2)


def check_divides(name: str, dim: int, heads: int) -> None:
    """Refuse heads that do not divide the width."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: dim must be a multiple of heads, got dim={dim} and heads={heads}")
