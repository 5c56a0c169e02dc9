"""Which calls and heads a user wants to watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

Layers = int | str | Sequence[int | str]
Heads = int | Sequence[int]


class Selection:
    """``layers`` by number or glob on the path, ``heads`` by number, or by number for each layer."""

    def __init__(self, layers: Layers | None, heads: Heads | Mapping[int | str, Heads] | None) -> None:
        self._layers = None if layers is None else _as_list(layers)
        self._heads = heads
        self._matched: set[int | str] = set()

    def wants(self, path: str, layer: int) -> bool:
        """Whether the layer of this number and path is chosen."""
        if self._layers is None:
            return True
        matches = [choice for choice in self._layers if _matches(choice, path, layer)]
        self._matched.update(matches)
        return bool(matches)

    @property
    def everywhere(self) -> bool:
        """Whether all heads of a layer are chosen."""
        return self._heads is None

    def heads(self, path: str, layer: int, number: int) -> list[int] | None:
        """The chosen heads of a layer that has this number of them; None for all."""
        chosen = self._heads
        if isinstance(chosen, Mapping):
            found = [heads for choice, heads in chosen.items() if _matches(choice, path, layer)]
            self._matched.update(choice for choice in chosen if _matches(choice, path, layer))
            if not found:
                return None
            chosen = found[0]
        if chosen is None:
            return None
        index = _as_list(chosen)
        for head in index:
            if not isinstance(head, int) or not -number <= head < number:
                raise IndexError(f"heads names head {head!r}, but {path} has {number} heads, 0 to {number - 1}")
        return sorted({int(head) % number for head in index})

    def check(self, seen: Sequence[str]) -> None:
        """Refuse choices that matched none of the layers seen."""
        choices: list[int | str] = list(self._layers or [])
        if isinstance(self._heads, Mapping):
            choices += list(self._heads)
        for choice in choices:
            if choice in self._matched:
                continue
            if isinstance(choice, int):
                raise IndexError(f"layer {choice} was chosen, but {len(seen)} attention calls were seen: {_list(seen)}")
            near = get_close_matches(choice, seen, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{choice!r} matches no attention call; seen were {_list(seen)}{hint}")


def _matches(choice: int | str, path: str, layer: int) -> bool:
    return choice == layer if isinstance(choice, int) else fnmatchcase(path, choice)


def _as_list(choice: Layers | Heads) -> list[int | str]:
    return [choice] if isinstance(choice, int | str) else list(choice)


def _list(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:6])
    return shown + (f" … {paths[-1]} ({len(paths)} in all)" if len(paths) > 7 else ", ".join(["", *paths[6:]]))
