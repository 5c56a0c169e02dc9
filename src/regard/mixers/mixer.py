"""What every mixer is: a layer on (batch, tokens, dim) with a state that goes on."""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional
from torch.utils.checkpoint import checkpoint

from regard.maps import AttentionMap
from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.in_turn import in_turn
from regard.mixers.layout import Layout, as_boolean
from regard.mixers.packed import unpack
from regard.mixers.state import CONTEXT, State

_PIECE = 2048  # tokens of all texts together
_TRAINED = 512 * 1024  # numbers in the tokens of which all that the backward pass needs is stored at a time
_SMALLEST_PIECE = 256  # below, the pieces' number costs more than their size saves


@dataclass(frozen=True)
class Facts:
    """What one wants to know of a mechanism before choosing it: its state is counted in numbers for each text.

    N are its tokens, D its width, H its heads, K the tokens of a short convolution, W those of a window and C of a segment, P
    persistent ones, F the features of a head, S states or codes, M exponentials, E the numbers of a memory in D²/H².
    """

    paper: str
    formula: str
    time: str
    state: str
    causal: bool = True
    bidirectional: bool = False
    cross: bool = False
    grids: bool = False
    """Whether it knows the places of an image's tokens, or of other grids'."""
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
    ended: a prompt and then token by token is the same as all at once. How the tokens lie is told beside them:

    - ``mask`` (batch, tokens) tells real tokens from padding, on either side, by booleans or by 1 and 0: padding leaves the
      state as it is, and its outputs are zeros.
    - Of texts that are packed into one row, ``cu_seqlens`` (texts + 1) tells the borders, which nothing crosses: each has a
      state of its own.
    - ``context`` (batch, other tokens, dim), with a ``context_mask``, is looked at instead: cross-attention, in the first
      call; the state keeps what further calls need of it.
    - ``grid``, the sides of an image or a video whose tokens these are, rows first.

    What a mechanism can do of these its `facts` say, and the rest is refused.

    Where no gradients are wanted, a long text is read piece by piece, each from the state of the one before: what it takes
    beside x and y does not grow with the text, and stays in the processor's cache.

    A subclass writes `mix` and states its `facts`; one that mixes values by a matrix is a `ValueMixer`.
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
    _made_of: tuple[tuple[Any, ...], Mapping[str, Any]]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keep what it is made of, by which it knows its own states."""
        mixer = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*arguments, **named)
        bound.apply_defaults()
        mixer.__dict__["_made_of"] = (arguments, named)
        mixer.__dict__["_arguments"] = {name: repr(value) for name, value in bound.arguments.items()}
        return mixer

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"{type(self).__name__}: dim must be at least 1, got {dim}")
        self.dim = dim

    def reset_parameters(self) -> None:
        """Give weights and buffers the numbers of a new layer, as after ``to_empty`` they need them.

        >>> import torch
        >>> from regard.mixers import DeltaRule
        >>> with torch.device("meta"):
        ...     mixer = DeltaRule(32)
        >>> mixer.to_empty(device="cpu").reset_parameters()
        >>> mixer.norm.weight[:3].tolist()
        [1.0, 1.0, 1.0]
        """
        arguments, named = self._made_of
        with torch.device("cpu"):
            fresh = type(self)(*arguments, **named)
        self.load_state_dict(fresh.state_dict())

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        grid: Sequence[int] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The mixed tokens, and the state after them; of packed texts, a row for each."""
        if cu_seqlens is not None:
            return self._packed(x, state, cu_seqlens, {"mask": mask, "grid": grid, "context": context})
        return self._run(x, state, self._layout(x, state, mask, grid, context, context_mask))

    def _layout(
        self,
        x: Tensor,
        state: State | None,
        mask: Tensor | None,
        grid: Sequence[int] | None,
        context: Tensor | None,
        context_mask: Tensor | None,
    ) -> Layout:
        """How the tokens lie, once all that a call was given has been checked."""
        cross = context is not None or (isinstance(state, State) and state.of_context)
        name = type(self).__name__
        layout = Layout(
            as_boolean(mask, f"the mask of {name}"), None if grid is None else tuple(grid), context,
            as_boolean(context_mask, f"the context_mask of {name}"), self.causal and not cross, cross,
        )  # fmt: skip
        self._check(x, state, layout)
        return layout

    def _packed(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor, others: Mapping[str, object]
    ) -> tuple[Tensor, State]:
        """The texts of one row, side by side."""
        for name, given in others.items():
            if given is not None:
                raise ValueError(f"{type(self).__name__} takes a {name} or cu_seqlens, got both")
        texts, real = unpack(x, cu_seqlens)
        outputs, ends = self(texts, state, None if bool(real.all()) else real)
        return outputs[real][None], ends

    def _run(self, x: Tensor, state: State | None, layout: Layout) -> tuple[Tensor, State]:
        """Mix the tokens, real ones brought to where `mix` wants them, whether anyone watches or not."""
        arranged, own, order = self._arranged(x, layout)
        y, after = self._read(arranged, None if state is None else state.tensors, own)
        return self._finished(y, after, x, state, layout, order)

    def _arranged(self, x: Tensor, layout: Layout) -> tuple[Tensor, Layout, Tensor | None]:
        """Tokens with zeros for padding, first where `mix` must have it so; how they lie; and their order if it is new."""
        if layout.mask is None:
            return x, layout, None
        if not self.padding_first or layout.cross:
            return x.masked_fill(~layout.mask[..., None], 0.0), layout, None
        order = layout.mask.long().argsort(dim=1, stable=True)
        real = layout.mask.gather(1, order)
        moved = x.gather(1, order[..., None].expand_as(x)).masked_fill(~real[..., None], 0.0)
        return moved, replace(layout, mask=real), order

    def _finished(
        self,
        y: Tensor,
        after: Mapping[str, Tensor],
        x: Tensor,
        state: State | None,
        layout: Layout,
        order: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Outputs where their tokens were given, zeros for padding, and the state."""
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        if layout.mask is not None:
            y = y.masked_fill(~layout.mask[..., None], 0.0)
        seen = x.shape[1] + (0 if state is None else state.seen)
        arguments = {**self._arguments, **({CONTEXT: "given"} if layout.cross else {})}
        return y, State(type(self).__name__, after, seen, x.dtype, arguments)

    def state(self, tensors: Mapping[str, Tensor], seen: int, dtype: torch.dtype) -> State:
        """These tensors, as a state of this layer after so many tokens of a dtype."""
        return State(type(self).__name__, tensors, seen, dtype, self._arguments)

    def _read(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
        """`mix`, in pieces where that is better; each is mixed again for its gradients, so that one at a time is stored."""
        piece = self._piece(x, layout)
        if x.shape[1] <= piece:
            return self.mix(x, state, layout)
        texts = x.split(piece, dim=1)
        masks = [None] * len(texts) if layout.mask is None else layout.mask.split(piece, dim=1)
        layouts = [replace(layout, mask=mask) for mask in masks]
        if layout.cross:  # which the state holds once the first piece is read
            layouts[1:] = [replace(other, context=None, context_mask=None) for other in layouts[1:]]
        if torch.is_grad_enabled():
            return self._read_again(list(zip(texts, layouts, strict=True)), state)
        first, after = self.mix(texts[0], state, layouts[0])
        y = first.new_empty(x.shape)  # pieces joined at the end would be held twice
        places = y.split(piece, dim=1)
        places[0].copy_(first)
        for text, own, place in zip(texts[1:], layouts[1:], places[1:], strict=True):
            output, after = self.mix(text, after, own)
            place.copy_(output)
        return y, after

    def _piece(self, x: Tensor, layout: Layout) -> int:
        """How many tokens are mixed at a time: all, where those that follow are seen, or pieces cost more."""
        if not self.in_pieces or not (layout.causal or layout.cross):
            return x.shape[1]
        batch, _, dim = x.shape
        at_once = _TRAINED // dim if torch.is_grad_enabled() else _PIECE
        return max(at_once // batch, _SMALLEST_PIECE)

    def _read_again(
        self, parts: list[tuple[Tensor, Layout]], state: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first piece by itself, after which it is known how large a state is."""

        def step(part: tuple[Tensor, Layout], before: Mapping[str, Tensor] | None) -> tuple[Tensor, Any]:
            return self.mix(part[0], before, part[1])

        first, after = checkpoint(step, parts[0], state, use_reentrant=False)
        outputs, after = in_turn(step, parts[1:], after, sum(tensor.numel() for tensor in after.values()))
        return torch.cat([first, *outputs], dim=1), after

    @abstractmethod
    def mix(self, x: Tensor, state: Mapping[str, Tensor] | None, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
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

    def _check(self, x: Tensor, state: State | None, layout: Layout) -> None:
        name = type(self).__name__
        if x.ndim != 3 or x.shape[2] != self.dim or not x.shape[0] or not x.shape[1]:
            raise ValueError(
                f"{name} takes x of shape (batch, tokens, {self.dim}), at least one of each, got {tuple(x.shape)}"
            )
        for what, given, can in (
            ("context", layout.context, self.facts.cross),
            ("grid", layout.grid, self.facts.grids),
        ):
            if given is not None and not can:
                raise ValueError(f"{name} takes no {what}; `regard mixers` tells which mixers do")
        layout.check(x, name)
        if layout.grid is not None and self.causal:
            raise ValueError(f"{name} reads a text in its order; of a grid each token sees all, with causal=False")
        if state is not None:
            self._check_state(x, state, layout)

    def _check_causal(self) -> None:
        if not self.causal:
            raise NotImplementedError(
                f"{type(self).__name__}(causal=False) is no dynamical system: what sees all tokens has no state on its way"
            )

    def _check_state(self, x: Tensor, state: State, layout: Layout) -> None:
        name = type(self).__name__
        if not self.causal and not layout.cross:
            raise ValueError(f"{name}(causal=False) goes on from no state: every token sees all others of its call")
        if not isinstance(state, State) or state.mixer != name:
            what = f"of {state.mixer}" if isinstance(state, State) else type(state).__name__
            raise ValueError(f"{name} goes on from a state of its own, got a state {what}")
        if layout.context is not None:
            has = "has the context that it began with" if state.of_context else "began with none"
            raise ValueError(
                f"{name} was given a context and a state, which {has}: a context comes with the first call"
            )
        given = {key: value for key, value in state.arguments.items() if key != CONTEXT}
        if given != self._arguments:
            pairs = {key: (self._arguments.get(key), given.get(key)) for key in self._arguments}
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


def without_weight_decay(parameter: Parameter) -> Parameter:
    """The parameter, marked ``_no_weight_decay``, as trainers look for it: a rate that decayed would become another one.

    >>> without_weight_decay(Parameter(torch.ones(2)))._no_weight_decay
    True
    """
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H·D) as (B, H, N, D)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def heads_of(x: Tensor, heads: int, *projections: Module) -> list[Tensor]:
    """What each projection gives of the tokens (B, N, dim), by heads: (B, H, N, D)."""
    return [split_heads(projection(x), heads) for projection in projections]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Heads (B, h, N, D), each as many times side by side as makes (B, H, N, D) of them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H·D)."""
    return x.transpose(1, 2).flatten(2)


def gated(heads: Tensor, x: Tensor, gate: Module | None) -> Tensor:
    """(B, H, N, D) as (B, N, H·D), times the SiLU of what a projection, if there is one, makes of the tokens (B, N, dim)."""
    joined = join_heads(heads)
    return joined if gate is None else joined * functional.silu(gate(x))


def check_divides(name: str, dim: int, heads: int) -> None:
    """Refuse heads that do not divide the width."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{name}: dim must be a multiple of heads, got dim={dim} and heads={heads}")


def check_groups(name: str, fewer: tuple[str, int], more: tuple[str, int]) -> None:
    """Refuse heads of which the more are no multiple of the fewer."""
    if fewer[1] < 1 or more[1] < 1 or more[1] % fewer[1]:
        raise ValueError(f"{name}: {more[0]} must be a multiple of {fewer[0]}, got {more[1]} and {fewer[1]}")


def expanded(name: str, width: int, factor: float, heads: int = 1) -> int:
    """A width made so many times as large, whole for each of its heads."""
    product = round(width * factor)
    if product < 1 or not math.isclose(product, width * factor, rel_tol=1e-5) or product % heads:
        raise ValueError(
            f"{name}: a width of {width}, expanded {factor:g} times, must be a multiple of {heads}, got {width * factor:g}"
        )
    return product
