"""Edits as text: JSON to share, the notation one would write in Python, and keys named by a passage of the text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import notation
from regard.steer.edit import Edit


def save_recipe(path: str | Path, edits: Sequence[Edit]) -> None:
    """Write edits to a JSON file that `load_recipe` reads.

    Raises:
        TypeError: an edit that holds a function, or another thing that JSON cannot hold.

    >>> import regard, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "recipe.json"
    >>> save_recipe(path, [regard.Reweight(keys=slice(1, 5), by=2.0, heads=[3])])
    >>> load_recipe(path)
    [Reweight(keys=slice(1, 5, None), by=2.0, heads=[3])]
    """
    written = [
        {"edit": type(edit).__name__} | {name: _to_json(value, edit, name) for name, value in edit.given().items()}
        for edit in edits
    ]
    Path(path).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def load_recipe(path: str | Path) -> list[Edit]:
    """Read the edits of a JSON file.

    Raises:
        ValueError: a file that is no such recipe, saying where.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, list) or not all(isinstance(entry, dict) and "edit" in entry for entry in read):
        raise ValueError(f'{path} is no recipe: expected a list of objects, each with an "edit" such as "Reweight"')
    return [
        notation.make(
            notation.kind_named(entry["edit"], Edit, "edit"),
            {name: _from_json(value) for name, value in entry.items() if name != "edit"},
        )
        for entry in read
    ]


def parse_edit(text: str) -> Edit:
    """Read an edit as one writes it: ``Reweight(keys="the secret number", by=4, layers="*.2.*")``.

    Raises:
        ValueError: anything but the call of an edit with plain values.

    >>> parse_edit('Block(keys=slice(0, 3), queries=[-1])')
    Block(keys=slice(0, 3, None), queries=[-1])
    """
    edit: Edit = notation.parse(text, Edit, "edit", "Reweight(keys=[0], by=0.5)")
    return edit


def locate(edit: Edit, text: str, tokenizer: Any) -> Edit:
    """The edit with every passage that it names replaced by the positions of its tokens.

    Args:
        edit: with strings for ``keys``, ``queries``, ``source`` or ``target``.
        text: as the model will read it.
        tokenizer: a fast tokenizer, as called on the text.

    Raises:
        ValueError: a passage that does not occur in the text, or more than once.

    >>> import regard
    >>> _, tokenizer = regard.mini()
    >>> locate(regard.Reweight(keys="is 48", by=2), "The code is 48.", tokenizer)
    Reweight(keys=[5, 6, 7, 8], by=2)
    """
    named = {name: where for name, where in edit.positions().items() if isinstance(where, str)}
    if not named:
        return edit
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return replace(edit, **{name: _tokens(passage, text, offsets) for name, passage in named.items()})


def _tokens(passage: str, text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    count = text.count(passage) if passage else 0
    if count != 1:
        where = [text.find(passage)] if count else []
        while len(where) < min(count, 3):
            where.append(text.find(passage, where[-1] + 1))
        found = f"occurs {count} times, at characters {', '.join(map(str, where))}" if count else "does not occur"
        raise ValueError(f"the passage {passage!r} {found} in the text; name one that occurs once, or give positions")
    start = text.find(passage)
    stop = start + len(passage)
    return [number for number, (first, last) in enumerate(offsets) if first < stop and last > start]


def _to_json(value: Any, edit: Edit, name: str) -> Any:
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Tensor):
        return {"mask": value.int().tolist()} if value.dtype == torch.bool else value.tolist()
    if isinstance(value, Mapping):
        return {"by layer": [[layer, heads] for layer, heads in value.items()]}
    if isinstance(value, list | tuple | range):
        return [_to_json(item, edit, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{edit}: {name} is a {type(value).__name__}, which a recipe cannot hold; give positions")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        kind, content = next(iter(value.items()))
        if kind == "slice":
            return slice(*content)
        if kind == "mask":
            return torch.tensor(content, dtype=torch.bool)
        if kind == "by layer":
            return dict(content)
        raise ValueError(f'a recipe\'s objects are "slice", "mask" or "by layer", got {kind!r}')
    return value
