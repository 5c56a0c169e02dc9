"""Layers, heads and passes, by the same grammar as positions."""

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.tokens import Selection, parse_layers

PATHS = {number: f"model.layers.{number}.self_attn" for number in range(6)}
quick = settings(deadline=None, derandomize=True, max_examples=100)


def layers_of(selection: Selection, number: int | None = 6) -> list[int]:
    return [layer for layer, path in PATHS.items() if selection.wants(path, layer, number)]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (2, [2]),
        (-1, [5]),
        (numpy.int64(3), [3]),
        ([0, -2], [0, 4]),
        (range(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(-2, None), [4, 5]),
        (numpy.array([1, -1]), [1, 5]),
        (torch.tensor([1, 5]), [1, 5]),
        ("*.3.*", [3]),
        (["*.[01].*", -1], [0, 1, 5]),
        ([slice(4, None), range(2), "*.2.*"], [0, 1, 2, 4, 5]),
        ([1, 0, 1], [0, 1]),
    ],
)
def test_layers(layers: Any, wanted: list[int]) -> None:
    selection = Selection(layers)
    assert layers_of(selection) == wanted
    selection.check(PATHS)


@quick
@given(st.none() | st.integers(-8, 7), st.none() | st.integers(-8, 7), st.none() | st.integers(-3, 3).filter(bool))
def test_slices_of_layers_and_passes(start: int | None, stop: int | None, step: int | None) -> None:
    chosen = slice(start, stop, step)
    wanted = list(range(6))[chosen]
    assert layers_of(Selection(layers=chosen)) == sorted(wanted)
    passes = Selection(passes=chosen)
    assert [index for index in range(6) if passes.wants_pass(index, 6)] == sorted(wanted)
    if not passes.counts_passes:
        assert [index for index in range(6) if passes.wants_pass(index)] == sorted(wanted)


@pytest.mark.parametrize("of_end", [-1, [0, -1], slice(-2, None), slice(0, -1), slice(None, None, -1)])
def test_what_counts_from_the_end_needs_the_number(of_end: Any) -> None:
    assert Selection(of_end).counts_layers
    assert Selection(passes=of_end).counts_passes
    with pytest.raises(ValueError, match=r"layer .* counts from the last, but how many there are is not known yet"):
        Selection(of_end).wants(PATHS[0], 0)
    with pytest.raises(ValueError, match=r"pass .* counts from the last"):
        Selection(passes=of_end).wants_pass(0)


def test_what_counts_from_the_start_needs_no_number() -> None:
    selection = Selection([0, slice(2, 4), "*.5.*"], passes=slice(1, None))
    assert not selection.counts_layers
    assert not selection.counts_passes
    assert layers_of(selection, None) == [0, 2, 3, 5]
    assert [selection.wants_pass(index) for index in range(3)] == [False, True, True]


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        (None, None),
        (1, [1]),
        (-1, [7]),
        ([7, 0, -1], [0, 7]),
        (slice(None, 2), [0, 1]),
        (range(2, 8, 3), [2, 5]),
        (numpy.array([3, 1]), [1, 3]),
        (torch.arange(8) > 5, [6, 7]),
        ([True] + [False] * 7, [0]),
        ([0, 1, 1], [0, 1]),
        ({2: 1, 3: [0]}, [1]),
        ({"*.2.*": [4], 2: 5}, [4]),
        ({-4: slice(6, None)}, [6, 7]),
        ({(1, 2): 3}, [3]),
        ({2: None}, None),
    ],
)
def test_heads(heads: Any, wanted: list[int] | None) -> None:
    assert Selection(heads=heads).heads(PATHS[2], 2, 8, 6) == wanted


def test_heads_by_layer_choose_the_layers_where_nothing_else_does() -> None:
    by_layer: dict[Any, Any] = {1: [0], "*.4.*": 2}
    assert layers_of(Selection(heads=by_layer)) == [1, 4]
    both = Selection(layers=[0, 1], heads=by_layer)
    assert layers_of(both) == [0, 1]
    assert both.heads(PATHS[0], 0, 4) is None
    assert both.heads(PATHS[1], 1, 4) == [0]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (4, r"heads names head 4, but model\.layers\.0\.self_attn has 4 heads, 0 to 3"),
        ([0, -5], "heads names head -5, but"),
        (slice(0, 5), "heads ends at 5, but model"),
        ([True] * 3, r"heads is a mask of shape \(3,\), but model.* has 4 heads"),
    ],
)
def test_heads_that_are_not_there(heads: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        Selection(heads=heads).heads(PATHS[0], 0, 4)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"layers": []}, ValueError, "layers is empty"),
        ({"heads": []}, ValueError, "heads is empty"),
        ({"heads": {}}, ValueError, r"heads is empty: \{\} names no layer"),
        ({"heads": {0: []}}, ValueError, "heads is empty"),
        ({"passes": range(0)}, ValueError, "passes is empty"),
        ({"layers": 1.5}, TypeError, r"layers must be .* got 1\.5"),
        ({"layers": [True, False]}, TypeError, "layers is a mask, which says too little of a model"),
        ({"layers": [[0], [1]]}, TypeError, "layers must be the same for all texts"),
        ({"heads": "3"}, TypeError, "heads are numbers, slices, ranges, or a mapping from layers to them, got '3'"),
        (
            {"heads": torch.tensor([1, 0], dtype=torch.int8)},
            ValueError,
            r"heads are zeros and ones, .* is this a mask\?",
        ),
        ({"passes": "0"}, TypeError, "passes are numbers, slices or ranges, got '0'"),
    ],
)
def test_choices_that_are_none(chosen: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Selection(**chosen)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (
            {"layers": [0, 9]},
            IndexError,
            r"layer 9 was chosen, but 6 attention calls were seen: .*layers.5.self_attn$",
        ),
        ({"layers": -7}, IndexError, "layer -7 was chosen"),
        ({"layers": slice(6, None)}, IndexError, "layer 6: was chosen"),
        ({"layers": slice(4, 7)}, IndexError, "layers ends at 7, but there are 6"),
        ({"layers": range(5, 8)}, IndexError, "layer 6 was chosen"),
        ({"heads": {8: [0]}}, IndexError, "layer 8 was chosen"),
        (
            {"layers": "model.layer.3.*"},
            ValueError,
            r"'model.layer.3.\*' matches no attention call; seen were .*; did you mean 'model.layers.3.self_attn'\?",
        ),
        ({"layers": 0, "heads": {"decoder.*": 1}}, ValueError, r"'decoder\.\*' matches no attention call"),
        ({"passes": [0, 3]}, IndexError, "pass 3 was chosen, but 3 passes were seen"),
        ({"passes": -4}, IndexError, "pass -4 was chosen"),
        ({"passes": slice(3, None)}, IndexError, "pass 3: was chosen, but 3 passes"),
    ],
)
def test_choices_that_matched_nothing(chosen: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Selection(**chosen).check(PATHS, passes=3)


def test_a_choice_is_held_to_the_layers_that_were_seen() -> None:
    seen = {1: "blocks.1.attention"}  # the other layers mix tokens in another way
    Selection(-3).check(seen, layers=4)
    with pytest.raises(IndexError, match=r"layer 0 was chosen, but 1 attention calls were seen: blocks\.1"):
        Selection(0).check(seen, layers=4)


def test_one_selection_serves_several_blocks() -> None:
    selection = Selection([0, "*.1.*"])
    assert layers_of(selection) == [0, 1]
    with pytest.raises(ValueError, match=r"'\*\.1\.\*' matches no attention call"):
        selection.check({0: "h.0.attn"})
    selection.check(PATHS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3", [3]),
        ("-1, 0", [-1, 0]),
        ("0-2,5", [0, 1, 2, 5]),
        ("4:", [slice(4, None)]),
        (":-2", [slice(None, -2)]),
        ("::2", [slice(None, None, 2)]),
        ("*.1[0-9].*,encoder-1", ["*.1[0-9].*", "encoder-1"]),
    ],
)
def test_layers_as_text(text: str, wanted: list[Any]) -> None:
    assert parse_layers(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"), [("0,,1", "layers has an empty entry: '0,,1'"), ("3-1", "from 3 down to 1")]
)
def test_layers_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(text)
