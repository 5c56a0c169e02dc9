"""Edits as text: what is written is what is read, and what cannot be read says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module

import regard
from regard.steer import Edit, load_recipe, parse_edit, save_recipe
from regard.tokens import locate

EDITS: list[Edit] = [
    regard.Reweight(keys=[0, -1], by=0.5, renormalize=False, layers="*.2.*", heads=[1, 5]),
    regard.Block(keys=slice(1, None, 2), queries=range(3, 9)),
    regard.Bias(torch.tensor([[True, False]]), -2.5, heads={"*.1.*": [0], 2: 3}),
    regard.Temperature(0.7, layers=[0, 2]),
    regard.Gate(0),
    regard.ReplaceMap("uniform"),
    regard.Redistribute("one passage", [4], 0.25),
    regard.AddToQuery([0.5, 1.0], queries=2),
]


def test_recipes_are_read_as_written(tmp_path: Path) -> None:
    save_recipe(tmp_path / "recipe.json", EDITS)
    read = load_recipe(tmp_path / "recipe.json")
    assert [type(edit) for edit in read] == [type(edit) for edit in EDITS]
    assert [str(edit).replace("range(3, 9)", str([*range(3, 9)])) for edit in EDITS] == [str(edit) for edit in read]


def test_functions_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"keys is a function, which a recipe cannot hold"):
        save_recipe(tmp_path / "recipe.json", [regard.Reweight(lambda ids: ids == 1, 2)])


@pytest.mark.parametrize("edit", [edit for edit in EDITS if not isinstance(edit, regard.Bias)])
def test_edits_are_read_as_shown(edit: Edit) -> None:
    assert parse_edit(repr(edit)) == edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Reweigh(keys=0, by=2)", r"there is no edit 'Reweigh'; did you mean Reweight\?"),
        ("Reweight(keys=0, by=2, key=3)", r"Reweight has no argument 'key'; it takes layers, heads, keys"),
        ("Reweight(keys=0)", r"Reweight cannot be made from keys: .*'by'"),
        ("Reweight(0, 2, None, True, 5)", r"takes at most 4 arguments without a name, got 5"),
        ("Reweight(keys=open('x'), by=2)", r"\"open\('x'\)\" in .* is no plain value"),
        ("Reweight(keys=0,", r"cannot read the edit"),
        ("5", r"expected an edit such as"),
        ("Reweight(keys=0, by=-2)", r"by to be a finite number of at least 0, got -2"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_edit(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ('{"edit": "Gate"}', "is no recipe"), ('[{"edit": "Gate", "by": {"x": 1}}]', "got 'x'")],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_passages_become_their_tokens(mini: tuple[Module, Any]) -> None:
    _, tokenizer = mini
    text = "It rained. The secret number of Ada is 48213. It rained again."
    edit = locate(regard.Redistribute("It rained. ", "secret number of Ada", 0.5), text, tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode([ids[position] for position in edit.target]) == " secret number of Ada"
    assert edit.source[0] == 1
    unchanged = regard.Reweight([3], 2)
    assert locate(unchanged, text, tokenizer) is unchanged


@pytest.mark.parametrize(
    ("passage", "message"),
    [("snow", "does not occur"), ("rained", r"occurs 2 times, at characters 3, 49"), ("", "does not occur")],
)
def test_passages_must_occur_once(mini: tuple[Module, Any], passage: str, message: str) -> None:
    text = "It rained. The secret number of Ada is 48213. It rained again."
    with pytest.raises(ValueError, match=message):
        locate(regard.Reweight(passage, 2), text, mini[1])


def test_a_passage_is_no_position() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"regard\.locate"), regard.steer(None, regard.Reweight("Ada", 2)):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
