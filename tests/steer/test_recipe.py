"""Edits as text: what is written is what is read, and what cannot be read says so."""

from pathlib import Path

import numpy
import pytest
import torch

import regard
from regard import masks
from regard.steer import Edit, load_recipe, parse_edit, save_recipe

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


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        (regard.Block([[0, 2], [1]]), regard.Block([[0, 2], [1]])),
        (regard.Block(numpy.array([3, 5])), regard.Block([3, 5])),
        (regard.Block(numpy.int64(3), heads=numpy.array([1])), regard.Block(3, heads=[1])),
        (regard.Block([True, False], heads={numpy.int64(2): numpy.array([0])}), regard.Block([True, False], heads={2: [0]})),
        (regard.Block(slice(numpy.int64(2), None), layers=[slice(0, 2), "*.5.*"]),
         regard.Block(slice(2, None), layers=[slice(0, 2), "*.5.*"])),
    ],
)  # fmt: skip
def test_recipes_hold_positions_in_every_form(tmp_path: Path, edit: Edit, same: Edit) -> None:
    save_recipe(tmp_path / "recipe.json", [edit])
    assert load_recipe(tmp_path / "recipe.json") == [same]


def test_recipes_hold_masks_as_tensors(tmp_path: Path) -> None:
    save_recipe(tmp_path / "recipe.json", [regard.Block(numpy.array([[True, False]]))])
    (read,) = load_recipe(tmp_path / "recipe.json")
    assert isinstance(read, regard.Block)
    assert torch.equal(torch.as_tensor(read.keys), torch.tensor([[True, False]]))


def test_rules_are_read_as_shown(tmp_path: Path) -> None:
    shown = "Restrict(mask=(window(left=3, right=0) | keys([0, 1])) & ~documents([4, 4]), layers=[-1])"
    edit = parse_edit(shown)
    assert repr(edit) == shown
    save_recipe(tmp_path / "recipe.json", [edit])
    (read,) = load_recipe(tmp_path / "recipe.json")
    assert repr(read) == shown
    with pytest.raises(TypeError, match="mask is a FromMaskMod, which a recipe cannot hold"):
        save_recipe(tmp_path / "recipe.json", [regard.Restrict(masks.from_mask_mod(lambda b, h, q, k: q == k))])
    with pytest.raises(ValueError, match=r"there is no rule 'windows'; did you mean window\?"):
        parse_edit("Restrict(windows(3, 0) | causal())")
    with pytest.raises(ValueError, match="window: left is a number of tokens"):
        parse_edit("Restrict(window(-1, 0))")


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
        ("Reweight(keys=0, by=2, key=3)", r"Reweight has no argument 'key'; it takes layers, heads, passes, keys"),
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
    [
        ("{", "is not JSON"),
        ('{"edit": "Gate"}', "is no recipe"),
        ('[{"edit": 3}]', "is no recipe"),
        ('[{"edit": "Gate", "by": {"x": 1}}]', "got 'x'"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_a_passage_is_no_position() -> None:
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"regard\.locate"), regard.steer(None, regard.Reweight("Ada", 2)):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
