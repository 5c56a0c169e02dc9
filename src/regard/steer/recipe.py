"""Edits as text: JSON to share, and the notation one would write in Python."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from regard import notation
from regard.masks import Mask
from regard.steer.edit import Edit


def save_recipe(path: str | Path, edits: Sequence[Edit]) -> None:
    """Write edits to a JSON file that `load_recipe` reads.

    Of strengths that are tensors it holds the values.

    Raises:
        TypeError: an edit that holds a function, a captured run, or another thing that JSON cannot hold.

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
    if not isinstance(read, list) or not all(isinstance(e, dict) and isinstance(e.get("edit"), str) for e in read):
        raise ValueError(f'{path} is no recipe: expected a list of objects, each with an "edit" such as "Reweight"')
    _load_methods()
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
    _load_methods()
    edit: Edit = notation.parse(text, Edit, "edit", "Reweight(keys=[0], by=0.5)")
    return edit


def _to_json(value: Any, edit: Edit, name: str) -> Any:
    if isinstance(value, slice):
        return {"slice": [_to_json(bound, edit, name) for bound in (value.start, value.stop, value.step)]}
    if isinstance(value, Tensor | numpy.ndarray) and value.ndim:
        mask = value.dtype in (torch.bool, bool)
        return {"mask": torch.as_tensor(value).int().tolist()} if mask else value.tolist()
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"by layer": [[_to_json(part, edit, name) for part in pair] for pair in value.items()]}
    if isinstance(value, list | tuple | range):
        return [_to_json(item, edit, name) for item in value]
    if isinstance(value, Mask) and _is_written(value):
        return {"rule": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    instead = "give positions" if name in edit.places else "keep it beside the recipe, and make the edit from it"
    raise TypeError(f"{edit}: {name} is a {type(value).__name__}, which a recipe cannot hold; {instead}")


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        kind = next(iter(value), "")
        content: Any = value.get(kind)
        if kind == "slice":
            return slice(*content)
        if kind == "mask":
            return torch.tensor(content, dtype=torch.bool)
        if kind == "rule":
            return notation.rule(content)
        if kind == "by layer":
            return {layer: _from_json(heads) for layer, heads in content}
        raise ValueError(f'a recipe\'s objects are "slice", "mask", "rule" or "by layer", got {kind!r}')
    return value


def _is_written(mask: Mask) -> bool:
    """Whether the rule is made again from how it is shown: not those of functions and of tensors."""
    try:
        return repr(notation.rule(repr(mask))) == repr(mask)
    except (ValueError, SyntaxError):
        return False


def _load_methods() -> None:
    """Have the edits of papers known by their names, too; importing regard loads none of them."""
    importlib.import_module("regard.steer.language")
    importlib.import_module("regard.steer.vision")
