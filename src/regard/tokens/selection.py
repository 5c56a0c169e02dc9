"""Which layers, heads and passes of a model a user means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy
from torch import Tensor

from regard.tokens.positions import Positions, indices, plain

Numbers = int | slice | Sequence[int] | numpy.ndarray[Any, Any] | Tensor
Layers = Numbers | str | Sequence[int | str | slice]
Heads = Positions
Passes = Numbers

_Choice = int | slice | str


class Selection:
    """The layers, heads and passes that something is about. It holds the choice alone, so that any number of blocks share it.

    Args:
        layers: the number of an attention call in order, negative from the last, a slice or range of them, a glob on the
            path of the module that makes it, or several of these; all by default.
        heads: numbers in the same way, or a mask over the heads; or a mapping from layers to heads, which chooses those
            layers where ``layers`` does not, and where it does leaves the others all their heads. Of several keys that
            name a layer the first counts.
        passes: numbers of the model's forward passes, in the same way: in ``generate`` 0 is the prompt and each step one
            more, in diffusion they are the denoising steps; all by default.

    Raises:
        TypeError: what can be no choice.
        ValueError: nothing chosen, as by ``heads=[]``.

    >>> chosen = Selection(layers=[0, "*.1.*"], heads={0: [2, -1]})
    >>> chosen.wants("model.layers.1.self_attn", 1), chosen.heads("model.layers.0.self_attn", 0, 8)
    (True, [2, 7])
    """

    def __init__(
        self,
        layers: Layers | None = None,
        heads: Heads | Mapping[Any, Heads | None] | None = None,
        passes: Passes | None = None,
    ) -> None:
        by_layer = heads if isinstance(heads, Mapping) else {}
        if isinstance(heads, Mapping) and not heads:
            raise ValueError("heads is empty: {} names no layer; leave it out, or name some")
        self._heads_by_layer = [(_choices(layer, "heads by layer"), of) for layer, of in by_layer.items()]
        self._heads = None if by_layer else heads
        for of in (*by_layer.values(), self._heads):
            _check_heads(of)
        named = [choice for choices, _ in self._heads_by_layer for choice in choices]
        self._layers = (named or None) if layers is None else _choices(layers, "layers")
        self._named = named
        self._passes = None if passes is None else _choices(passes, "passes")
        self.every_head = self._heads is None and not self._heads_by_layer
        """Whether all heads of each layer are chosen."""
        self.counts_layers = any(_from_the_end(choice) for choice in [*(self._layers or []), *named])
        """Whether `wants` and `heads` need the number of layers: a choice counts from the last."""

    @property
    def counts_passes(self) -> bool:
        """Whether `wants_pass` needs the number of passes: a choice counts from the last."""
        return any(_from_the_end(choice) for choice in self._passes or [])

    def wants(self, path: str, layer: int, layers: int | None = None) -> bool:
        """Whether the layer of this number and path is chosen, where there are so many ``layers``.

        Raises:
            ValueError: a choice that counts from the last layer, where their number is not given.
        """
        return self._layers is None or _any_names(self._layers, path, layer, layers, "layer")

    def heads(self, path: str, layer: int, number: int, layers: int | None = None) -> list[int] | None:
        """The chosen heads of a layer that has this ``number`` of them, in order; None for all.

        Raises:
            IndexError: a head that the layer has not, or a mask for another number.
            ValueError: as `wants`.
        """
        chosen = self._heads
        for choices, of in self._heads_by_layer:
            if _any_names(choices, path, layer, layers, "layer"):
                chosen = of
                break
        if chosen is None or isinstance(chosen, Mapping):
            return None
        there = f"{path} has {number} heads, 0 to {number - 1}"
        return sorted(set(indices(chosen, number, "heads", unit="heads", name="head", there=there).tolist()))

    def wants_pass(self, index: int, passes: int | None = None) -> bool:
        """Whether the pass of this number is chosen, where there are so many ``passes``.

        Raises:
            ValueError: a choice that counts from the last pass, where their number is not given.
        """
        return self._passes is None or _any_names(self._passes, "", index, passes, "pass")

    def check(self, seen: Mapping[int, str], layers: int | None = None, passes: int | None = None) -> None:
        """Refuse choices that matched nothing.

        Args:
            seen: the path of each attention call that was seen, by its number.
            layers: how many there are, if some of them were not seen as attention calls.
            passes: how many were seen.

        Raises:
            IndexError: a number of a layer or pass that was not seen.
            ValueError: a glob that matches no path, with the nearest one.

        >>> Selection(layers="layer.0.*").check({0: "layers.0.attention", 1: "layers.1.attention"})
        Traceback (most recent call last):
        ValueError: 'layer.0.*' matches no attention call; seen were layers.0.attention, layers.1.attention; did you mean
        'layers.0.attention'?
        """
        number = max(seen, default=-1) + 1 if layers is None else layers
        for choice in [*(self._layers or []), *self._named]:
            if not any(_names(choice, path, layer, number) for layer, path in seen.items()):
                raise _unseen(choice, list(seen.values()))
            if isinstance(choice, slice) and choice.stop is not None and choice.stop > number:
                raise IndexError(f"layers ends at {choice.stop}, but there are {number}")
        for choice in [] if passes is None else self._passes or []:
            if not any(_names(choice, "", index, passes) for index in range(passes or 0)):
                raise IndexError(f"pass {_written(choice)} was chosen, but {passes} passes were seen")


def parse_layers(text: str) -> list[int | str | slice]:
    """Layers as one writes them on a command line: numbers, negative too, ranges as 0-2 or 4:, and globs, with commas.

    Raises:
        ValueError: an empty entry.

    >>> parse_layers("0-2, -1, 4:, *.1.self_attn")
    [0, 1, 2, -1, slice(4, None, None), '*.1.self_attn']
    """
    return [choice for part in text.split(",") for choice in _parsed(part.strip(), text)]


def _parsed(part: str, text: str) -> Iterable[_Choice]:
    if not part:
        raise ValueError(
            f"layers has an empty entry: {text!r}; write numbers, ranges such as 0-2, or globs, with commas"
        )
    if re.fullmatch(r"-?\d+", part):
        return [int(part)]
    if closed := re.fullmatch(r"(\d+)-(\d+)", part):
        first, last = map(int, closed.groups())
        if last < first:
            raise ValueError(f"layers goes from {first} down to {last}: {part!r}")
        return range(first, last + 1)
    if re.fullmatch(r"-?\d*(:-?\d*){1,2}", part):
        return [slice(*(int(bound) if bound else None for bound in part.split(":")))]
    return [part]


def _choices(given: Any, what: str) -> list[_Choice]:
    """Numbers, slices and globs, one after the other."""
    if isinstance(given, str):
        if what == "passes":
            raise TypeError(f"passes are numbers, slices or ranges, got {given!r}")
        return [given]
    if isinstance(given, list | tuple) and any(isinstance(entry, str | slice | range) for entry in given):
        return [choice for entry in given for choice in _choices(entry, what)]
    read = plain(given, what, repeats=True)
    if isinstance(read, Tensor):
        raise TypeError(f"{what} is a mask, which says too little of a model; give numbers, slices or globs")
    if isinstance(read, slice):
        return [read]
    if not isinstance(read[0], int):
        raise TypeError(f"{what} must be the same for all texts, got a list for each of {len(read)}")
    return read  # type: ignore[return-value]


def _check_heads(heads: Any) -> None:
    """Refuse what can be no heads, before a layer is seen."""
    if heads is None:
        return
    if isinstance(heads, str):
        raise TypeError(f"heads are numbers, slices, ranges, or a mapping from layers to them, got {heads!r}")
    plain(heads, "heads", repeats=True)


def _any_names(choices: list[_Choice], path: str, number: int, total: int | None, what: str) -> bool:
    if total is None:
        for choice in choices:
            if _from_the_end(choice):
                raise ValueError(
                    f"{what} {_written(choice)} counts from the last, but how many there are is not known yet; "
                    "name it by its number from 0"
                )
    return any(_names(choice, path, number, total) for choice in choices)


def _names(choice: _Choice, path: str, number: int, total: int | None) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(path, choice)
    if isinstance(choice, slice):
        return number in range(number + 1 if total is None else total)[choice]
    return choice == number or (total is not None and choice + total == number)


def _from_the_end(choice: _Choice) -> bool:
    if isinstance(choice, slice):
        return min(choice.start or 0, choice.stop or 0) < 0 or (choice.step or 1) < 0
    return isinstance(choice, int) and choice < 0


def _unseen(choice: _Choice, paths: list[str]) -> Exception:
    if not isinstance(choice, str):
        return IndexError(
            f"layer {_written(choice)} was chosen, but {len(paths)} attention calls were seen: {_list(paths)}"
        )
    near = get_close_matches(choice, paths, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{choice!r} matches no attention call; seen were {_list(paths)}{hint}")


def _written(choice: _Choice) -> str:
    if not isinstance(choice, slice):
        return str(choice)
    bounds = [choice.start, choice.stop, *([] if choice.step is None else [choice.step])]
    return ":".join("" if bound is None else str(bound) for bound in bounds)


def _list(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:6])
    return shown + (f" … {paths[-1]} ({len(paths)} in all)" if len(paths) > 7 else ", ".join(["", *paths[6:]]))
