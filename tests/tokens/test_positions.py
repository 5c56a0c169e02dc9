"""Every form of positions, against a definition on Python's lists."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.tokens import Where, among, check, check_form, indices, resolve

quick = settings(deadline=None, derandomize=True, max_examples=150)


def bits(mask: Tensor) -> list[list[bool]]:
    return mask.tolist()


def of_numbers(numbers: list[int], start: int, length: int) -> list[bool]:
    """Which tokens start … start + length − 1 are named, where the text has no others after them."""
    whole = list(range(start + length))
    named = [whole[number] for number in numbers if -len(whole) <= number < len(whole)]
    return [position in named for position in whole[start:]]


FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": numpy.array,
    "narrow array": lambda numbers: numpy.array(numbers, dtype=numpy.int16),
    "array of objects": lambda numbers: numpy.array(numbers, dtype=object),
    "list of numpy's": lambda numbers: [numpy.int32(number) for number in numbers],
    "tensor": torch.tensor,
    "narrow tensor": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    "list of tensors": lambda numbers: [torch.tensor(number) for number in numbers],
}
MASKS: dict[str, Callable[[list[bool]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": numpy.array,
    "list of numpy's": lambda booleans: [numpy.bool_(boolean) for boolean in booleans],
    "tensor": torch.tensor,
    "one text": lambda booleans: torch.tensor([booleans]),
    "array of one text": lambda booleans: numpy.array([booleans]),
    "list of one text": lambda booleans: [booleans],
}
# Sorted, distinct and with one above 1: a list of zeros and ones that repeats is taken for a mask.
some_numbers = st.lists(st.integers(-14, 13), min_size=1, max_size=6, unique=True).filter(
    lambda numbers: len(numbers) < 3 or not set(numbers) <= {0, 1}
)
places = st.tuples(st.integers(0, 6), st.integers(1, 7))


@quick
@given(some_numbers, places, st.sampled_from(list(FORMS)))
def test_numbers(numbers: list[int], place: tuple[int, int], form: str) -> None:
    assert bits(resolve(FORMS[form](numbers), *place)) == [of_numbers(numbers, *place)]


@quick
@given(st.integers(-14, 13), places, st.sampled_from([int, numpy.int64, numpy.int8, torch.tensor, numpy.array]))
def test_one_number(number: int, place: tuple[int, int], form: Callable[[int], Any]) -> None:
    assert bits(resolve(form(number), *place)) == [of_numbers([number], *place)]


bounds = st.none() | st.integers(-9, 15)


@quick
@given(bounds, bounds, st.none() | st.integers(-4, 4).filter(bool), places)
def test_slices(start: int | None, stop: int | None, step: int | None, place: tuple[int, int]) -> None:
    chosen = list(range(sum(place)))[start:stop:step]
    assert bits(resolve(slice(start, stop, step), *place)) == [of_numbers(chosen, *place)]


@quick
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 3), places)
def test_ranges(start: int, more: int, step: int, place: tuple[int, int]) -> None:
    numbers = range(start, start + more, step)
    assert bits(resolve(numbers, *place)) == [of_numbers(list(numbers), *place)]


@quick
@given(st.lists(st.booleans(), min_size=1, max_size=14), places, st.sampled_from(list(MASKS)))
def test_masks(booleans: list[bool], place: tuple[int, int], form: str) -> None:
    named = [number for number, boolean in enumerate(booleans) if boolean]
    assert bits(resolve(MASKS[form](booleans), *place)) == [of_numbers(named, *place)]


@quick
@given(st.lists(some_numbers, min_size=1, max_size=4), places, st.integers(1, 3))
def test_positions_of_each_text(rows: list[list[int]], place: tuple[int, int], beams: int) -> None:
    wanted = [of_numbers(numbers, *place) for numbers in rows for _ in range(beams if len(rows) > 1 else 1)]
    every: tuple[Any, ...] = (rows, [torch.tensor(row) for row in rows], tuple(map(tuple, rows)))
    for given_as in every:
        assert bits(resolve(given_as, *place, batch=len(rows) * beams)) == wanted
    masks = [[number in {n % 14 for n in row} for number in range(14)] for row in rows]
    wanted = [of_numbers([n for n in range(14) if mask[n]], *place) for mask in masks]
    forms: tuple[Any, ...] = (masks, numpy.array(masks), torch.tensor(masks), [numpy.array(mask) for mask in masks])
    for mask in forms:
        assert bits(resolve(mask, *place)) == wanted


@quick
@given(st.lists(st.booleans(), min_size=13, max_size=13).filter(any), places)
def test_one_choice_is_the_same_in_every_form(booleans: list[bool], place: tuple[int, int]) -> None:
    named = [number for number, boolean in enumerate(booleans) if boolean]
    wanted = resolve(torch.tensor(booleans), *place)
    every = [make(booleans) for make in MASKS.values()]
    if len(named) < 3 or not set(named) <= {0, 1}:
        every += [make(named) for make in FORMS.values()] + [[named], numpy.array([named])]
    every.append(lambda ids: torch.tensor(booleans)[None].expand_as(ids))
    for where in every:
        assert torch.equal(resolve(where, *place, token_ids=torch.zeros(1, 13, dtype=torch.long)), wanted)


def test_everything_and_rows_without_positions() -> None:
    assert bits(resolve(None, 3, 2)) == [[True, True]]
    assert bits(resolve(torch.tensor(0, dtype=torch.uint8), 0, 2)) == [[True, False]]
    assert bits(resolve([[], [1]], 0, 2)) == [[False, False], [False, True]]
    assert bits(resolve(torch.tensor([[0, -1], [1, 2]]), 0, 4)) == [
        [True, False, False, True],
        [False, True, True, False],
    ]


def test_a_function_is_asked_about_all_ids() -> None:
    ids = torch.tensor([[5, 7, 5], [7, 7, 7]])
    assert bits(resolve(lambda of: of == 7, 1, 2, batch=4, token_ids=ids)) == [[True, False]] * 2 + [[True, True]] * 2


@quick
@given(st.lists(st.integers(-5, 4), min_size=1, max_size=7), st.sampled_from(list(FORMS)))
def test_indices_keep_their_order(numbers: list[int], form: str) -> None:
    assert indices(FORMS[form](numbers), 5).tolist() == [list(range(5))[number] for number in numbers]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (2, [2]),
        (-1, [4]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(-99, 2), [0, 1]),
        (range(3, 0, -1), [3, 2, 1]),
        ([True, False, False, False, True], [0, 4]),
        (numpy.array([[False, True, True, False, False]]), [1, 2]),
        ([0, 0, 1, 1], [0, 0, 1, 1]),
    ],
)
def test_indices(where: Any, wanted: list[int]) -> None:
    assert indices(where, 5).tolist() == wanted


@quick
@given(some_numbers.filter(lambda numbers: all(-5 <= n < 5 for n in numbers)))
def test_among_is_resolve_of_what_is_there(numbers: list[int]) -> None:
    assert torch.equal(among(numbers, 5), resolve(numbers, 0, 5))
    assert bits(among([False] * 5, 5)) == [[False] * 5]


FORMS_OF = r"must be an int, a slice, a range, several ints, several for each text, or a boolean mask .* got "

NO_POSITIONS: list[tuple[Any, type[Exception], str]] = [
    (1.0, TypeError, FORMS_OF + r"1\.0$"),
    ([0, 1.5], TypeError, FORMS_OF + r"1\.5 among them"),
    ([float("nan")], TypeError, FORMS_OF + "nan among them"),
    (torch.tensor([0.0, 1.0]), TypeError, FORMS_OF + r"float32 \(2,\)"),
    (numpy.array([numpy.nan]), TypeError, FORMS_OF + r"float64 \(1,\)"),
    (torch.tensor(True), TypeError, FORMS_OF + r"bool \(\)"),
    (True, TypeError, FORMS_OF + "True"),
    ({3, 4}, TypeError, FORMS_OF + r"\{3, 4\}"),
    (torch.ones(1, 2, 3, dtype=torch.bool), TypeError, FORMS_OF + r"bool \(1, 2, 3\)"),
    (torch.ones(1, 2, 3, dtype=torch.long), TypeError, FORMS_OF + r"int64 \(1, 2, 3\)"),
    ([1, None], TypeError, FORMS_OF + "None among them"),
    (["a"], TypeError, FORMS_OF + "a among them"),
    ([True, 3], TypeError, r"must be positions or booleans, got both in one list: \[True, 3\]"),
    ([[0], [True]], TypeError, r"must be positions for each text, or masks of one length, got \[\[0\], \[True\]\]"),
    ([[True], [True, False]], TypeError, "must be positions for each text, or masks of one length"),
    ([[0], 1], TypeError, FORMS_OF + r"\[0\] among them"),
    (slice(0.5, 3), TypeError, r"must be a slice of ints, got slice\(0.5, 3, None\)"),
    (slice(0, 3, 0), ValueError, "is a slice that goes nowhere"),
    ([], ValueError, r"is empty: \[\] names none; leave it out, or name some"),
    ((), ValueError, "is empty"),
    (range(3, 3), ValueError, r"is empty: range\(3, 3\)"),
    ([[], []], ValueError, "is empty"),
    (torch.tensor([]), ValueError, "is empty"),
    (numpy.zeros((2, 0), dtype=int), ValueError, "is empty"),
    (torch.tensor([1, 0, 1], dtype=torch.int8), ValueError, r"are zeros and ones, int8 \(3,\): is this a mask\?"),
    (
        torch.tensor([1, 0], dtype=torch.uint8),
        ValueError,
        r"are zeros and ones, .* is this a mask\? Pass booleans, as \.bool\(\) makes them",
    ),
    (numpy.ones((2, 3), dtype=numpy.uint8), ValueError, r"are zeros and ones, uint8 \(2, 3\)"),
    ([1, 0, 1, 1], ValueError, r"are zeros and ones, \[1, 0, 1, 1\]: is this a mask\?"),
    (torch.ones(2, 12, dtype=torch.long), ValueError, r"are zeros and ones, 12 of them: is this a mask\?"),
]


@pytest.mark.parametrize(("where", "error", "message"), NO_POSITIONS)
def test_what_can_be_no_positions(where: Any, error: type[Exception], message: str) -> None:
    for ask in (
        lambda: resolve(where, 0, 5, what="keys"),
        lambda: check(where, 5, "keys"),
        lambda: check_form(where, "keys"),
        lambda: among(where, 5, "keys"),
    ):
        with pytest.raises(error, match="^keys " + message):
            ask()


def test_passages_and_functions_may_be_given_but_are_no_positions() -> None:
    check_form("a passage")
    check_form(lambda ids: ids == 1)
    check(lambda ids: ids == 1, 5)
    check(None, 5)
    for ask in (
        lambda: resolve("a passage", 0, 5),
        lambda: check("a passage", 5),
        lambda: indices("a passage", 5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"'a passage' is a passage of a text; regard\.locate"):
            ask()


@pytest.mark.parametrize(
    ("ids", "returns", "message"),
    [
        (None, None, "keys is a function of token ids, but of 5 tokens none are known: .* not given them as input_ids"),
        (torch.ones(1, 3), None, "of 5 tokens only those of the first 3 are known"),
        (
            torch.ones(1, 5),
            torch.ones(1, 5),
            r"must return a boolean mask of shape \(1, 5\), got torch.float32 \(1, 5\)",
        ),
        (torch.ones(1, 5), torch.ones(5, dtype=torch.bool), r"of shape \(1, 5\), got torch.bool \(5,\)"),
        (torch.ones(1, 5), [True] * 5, "got list"),
    ],
)
def test_functions_that_cannot_be_asked(ids: Tensor | None, returns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(lambda of: returns, 2, 3, token_ids=ids, what="keys")


def test_another_number_of_texts() -> None:
    with pytest.raises(ValueError, match="keys is a mask for 3 texts, or positions for so many, but the batch is 2"):
        resolve([[0], [1], [2]], 0, 3, batch=2, what="keys")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (9, IndexError, "keys names position 9, but 5 tokens were seen"),
        (-6, IndexError, "keys names position -6, but 5 tokens"),
        ([0, 5], IndexError, "keys names position 5, but"),
        (numpy.array([0, 5]), IndexError, "keys names position 5, but"),
        (range(2, 7), IndexError, "keys names position 5, but"),
        (slice(2, 6), IndexError, "keys ends at 6, but 5 tokens"),
        (slice(7, 0, -1), IndexError, "keys starts at 7, but 5 tokens"),
        ([[0], [6]], IndexError, "keys of text 1 names position 6, but 5 tokens"),
        (torch.arange(8) > 1, IndexError, "keys names position 5, but 5 tokens"),
        (torch.arange(8) > 6, IndexError, "keys names position 7, but 5 tokens"),
        (slice(5, None), ValueError, "keys select none of the 5 tokens that were seen"),
        ([False] * 5, ValueError, "keys select none of the 5 tokens"),
        (torch.zeros(2, 5, dtype=torch.bool), ValueError, "keys select none of the 5 tokens"),
    ],
)
def test_what_no_text_reached(where: Where, error: type[Exception], message: str) -> None:
    resolve(where, 0, 5)  # a text may reach it yet
    with pytest.raises(error, match=message):
        check(where, 5, "keys")


@pytest.mark.parametrize("where", [0, -5, [4], slice(-9, None), slice(3, 5), slice(None, None, -1), [[0], []], [True]])
def test_what_a_text_reached(where: Where) -> None:
    check(where, 5)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ([0, 7], IndexError, "segment names position 7, but there are 5 keys"),
        (slice(1, 6), IndexError, "segment ends at 6, but there are 5 keys"),
        ([True] * 6, IndexError, r"segment is a mask of shape \(6,\), but there are 5 keys"),
        (torch.ones(2, 4, dtype=torch.bool), IndexError, r"segment is a mask of shape \(2, 4\), but there are 5 keys"),
        (slice(3, 3), ValueError, r"segment is empty: slice\(3, 3, None\) of 5 keys names none"),
    ],
)
def test_what_is_not_there(where: Any, error: type[Exception], message: str) -> None:
    for ask in (indices, among):
        with pytest.raises(error, match=message):
            ask(where, 5, "segment", unit="keys")


def test_indices_are_the_same_for_all_texts() -> None:
    with pytest.raises(TypeError, match="rows must be the same for all texts, got a list for each of 2"):
        indices([[0], [1]], 5, "rows")
    with pytest.raises(IndexError, match=r"rows is a mask of shape \(2, 5\), but there are 5 queries"):
        indices(torch.ones(2, 5, dtype=torch.bool), 5, "rows", unit="queries")
    with pytest.raises(ValueError, match=r"rows is empty: .* of 5 tokens names none"):
        indices([False] * 5, 5, "rows")
