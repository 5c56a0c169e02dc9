"""What a model is given, and what the tokens are called that its attention goes between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, HiddenCall, Proceed, Site, entered
from regard.tokens import Spelling


@dataclass(frozen=True)
class Picture:
    """An image as a model saw it, and which of its tokens stand for which patches.

    Args:
        png: the image, cut and scaled as the model was given it, as a PNG file.
        height: rows of patches.
        width: patches in a row.
        positions: of the tokens, row after row from the upper left: height · width of them.

    Raises:
        ValueError: more or fewer positions than patches.

    >>> Picture(b"", 2, 3, tuple(range(1, 7))).place(6)
    (1, 2)
    """

    png: bytes
    height: int
    width: int
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.positions) != self.height * self.width:
            raise ValueError(f"{self.height}×{self.width} patches need as many positions, got {len(self.positions)}")

    def place(self, position: int) -> tuple[int, int]:
        """Row and column of the patch that the token at a position stands for.

        Raises:
            ValueError: it stands for none.
        """
        return divmod(self.positions.index(position), self.width)

    def shifted(self, down: int, across: int, tokens: int) -> Tensor:
        """For each of so many tokens the position of the patch so far below and to the right of its own, −1 for none.

        >>> Picture(b"", 2, 2, (1, 2, 3, 4)).shifted(1, 0, 5).tolist()
        [-1, 3, 4, -1, -1]
        """
        grid = torch.tensor(self.positions).view(self.height, self.width)
        targets = torch.full((tokens,), -1)
        for number, position in enumerate(self.positions):
            row, column = number // self.width + down, number % self.width + across
            if 0 <= row < self.height and 0 <= column < self.width:
                targets[position] = grid[row, column]
        return targets

    def coordinates(self, tokens: int) -> Tensor:
        """(tokens, 2): row and column of each token's patch, NaN where it stands for none."""
        places = torch.full((tokens, 2), torch.nan)
        number = torch.arange(len(self.positions))
        places[list(self.positions)] = torch.stack([number // self.width, number % self.width], dim=1).float()
        return places


def patch_name(row: int, column: int) -> str:
    """What a patch is called, row and column counted from 0 at the upper left.

    >>> patch_name(0, 3)
    'row 0, column 3'
    """
    return f"row {row}, column {column}"


@dataclass(frozen=True)
class Tokens:
    """A sequence of tokens that a model attends from or to.

    Args:
        names: one for each token: a tokenizer's piece, a patch's row and column, a time.
        special: (tokens,) boolean: those that stand for nothing that was given, such as class tokens and separators.
        words: whether they are pieces of a text, whose order and repetitions mean something.
        ordered: whether those beside each other belong beside each other, as words and moments do.
        spelling: how the tokenizer writes them, where it is known.
        segments: named stretches, such as two texts that are compared: which positions belong to each.
        picture: the image that some or all of them are patches of.
    """

    names: tuple[str, ...]
    special: Tensor
    words: bool = False
    ordered: bool = False
    spelling: Spelling | None = None
    segments: Mapping[str, Sequence[int]] = field(default_factory=dict)
    picture: Picture | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Part:
    """Attention calls of a model that go from one sequence of tokens to another, or to itself.

    Args:
        name: what the calls are, such as "Cross-attention".
        queries: the tokens that look.
        keys: the tokens that are looked at.
        layers: the paths of the calls; None for all that the model makes.
    """

    name: str
    queries: Tokens
    keys: Tokens
    layers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """One pass of a model: what it is given, and which parts of its attention then go between which tokens.

    Args:
        model: what runs, the model or a part of it.
        inputs: its arguments.
        parts: at least one.
        calls: every attention call that the pass makes, where that was asked before; the parts name theirs among them.
        notes: what one should know of what was read, a line each.
    """

    model: Module
    inputs: dict[str, Any]
    parts: tuple[Part, ...]
    calls: tuple[FoundCall, ...] = ()
    notes: tuple[str, ...] = ()

    def run(self) -> None:
        """Have the model read it."""
        config = getattr(self.model, "config", None)
        no_cache = {"use_cache": False} if getattr(config, "use_cache", False) else {}
        self.model(**self.inputs, **no_cache)


@dataclass(frozen=True)
class FoundCall:
    """An attention call that a model makes: its module's path, and how many queries and keys it has."""

    path: str
    queries: int
    keys: int


class _Finder:
    """Takes note of calls as they come."""

    edits = outermost = False

    def __init__(self) -> None:
        self.found: list[FoundCall] = []

    def wants(self, site: Site) -> bool:
        """Whether it is asked for: every call is."""
        return True

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output."""
        queries = call.queries if isinstance(call, HiddenCall) else call.query.shape[2]
        self.found.append(FoundCall(call.place.path, queries, call.value.shape[2]))
        return proceed(call)


def find_calls(model: Module, inputs: Mapping[str, Any]) -> tuple[FoundCall, ...]:
    """The attention calls that a model makes of its inputs, in their order: one plain pass.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> find_calls(model, tokenizer("It rained", return_tensors="pt"))[0]
    FoundCall(path='model.layers.0.self_attn', queries=4, keys=4)
    """
    finder = _Finder()
    with torch.inference_mode(), entered(finder, model):
        model(**inputs)
    return tuple(finder.found)


def no_special(tokens: int) -> Tensor:
    """A mask by which none of so many tokens is special."""
    return torch.zeros(tokens, dtype=torch.bool)
