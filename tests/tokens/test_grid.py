"""Which token stands for which patch, against counting."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regard
from regard.tokens import Grid

sizes = st.integers(1, 5)
grids = st.builds(Grid, sizes, sizes, sizes, st.integers(0, 9), st.integers(0, 2))
quick = settings(deadline=None, derandomize=True, max_examples=60)


def counted(grid: Grid) -> dict[tuple[int, int, int], int]:
    """The position of each (frame, row, column), one token after the other."""
    found, position = {}, grid.start
    for frame, row in product(range(grid.frames), range(grid.height)):
        for column in range(grid.width):
            found[frame, row, column] = position
            position += 1
        position += grid.row_end
    return found


@quick
@given(grids)
def test_places_and_positions(grid: Grid) -> None:
    every = counted(grid)
    assert len(grid) == len(every)
    assert grid.positions() == list(every.values())
    for place, position in every.items():
        frame, row, column = place
        assert grid.position(row, column, frame) == position
        assert grid.place(position) == place
        assert grid.position(row - grid.height, column - grid.width, frame - grid.frames) == position
    for position in {*range(grid.start + len(grid) * 3)} - set(every.values()):
        with pytest.raises(IndexError, match=f"no patch of .* stands at position {position}"):
            grid.place(position)


@quick
@given(grids, st.integers(1, 3))
def test_borders(grid: Grid, thickness: int) -> None:
    wanted = [
        position
        for (_, row, column), position in counted(grid).items()
        if min(row, column, grid.height - 1 - row, grid.width - 1 - column) < thickness
    ]
    assert grid.border(thickness) == wanted


@quick
@given(sizes, sizes, st.integers(1, 4), st.data())
def test_a_box_of_pixels_is_the_patches_of_its_pixels(height: int, width: int, patch: int, data: st.DataObject) -> None:
    grid, tall, wide = Grid(height, width), height * patch, width * patch
    left, right = sorted(data.draw(st.lists(st.integers(0, wide), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, tall), min_size=2, max_size=2, unique=True)))
    pixels = product(range(top, bottom), range(left, right))
    wanted = sorted({grid.position(y // patch, x // patch) for y, x in pixels})
    assert grid.box(left, top, right, bottom, image=(tall, wide)) == wanted
    assert grid.box(left / wide, top / tall, right / wide, bottom / tall) == wanted


def test_boxes_in_some_frames() -> None:
    grid = Grid(2, 2, frames=3, start=1)
    assert grid.box(0, 0, 0.5, 0.5, frames=[0, -1]) == [1, 9]
    assert Grid(3, 100).box(0.29, 0, 0.3, 0.3) == [29]  # 0.29 · 100 is 28.999999999999996


def test_rows_and_columns_are_chosen_as_positions_are() -> None:
    grid = Grid(3, 4)
    assert grid.positions(rows=-1) == [8, 9, 10, 11]
    assert grid.positions(rows=[True, False, True], columns=slice(1, 3)) == [1, 2, 9, 10]
    x = torch.randn(1, 13, 16)
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    with torch.no_grad(), regard.watch(layer, regard.Mass({"border": Grid(3, 4, start=1).border()})) as seen:
        layer(x, x, x)
    assert (seen.dataset().mass < 1).all()


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: Grid(0, 3), ValueError, "Grid needs height to be an int of at least 1, got 0"),
        (lambda: Grid(2, 2.0), ValueError, "Grid needs width to be an int of at least 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: Grid(2, 2, start=-1), ValueError, "start to be an int of at least 0, got -1"),
        (lambda: Grid(2, 3).position(2, 0), IndexError, "rows names position 2, but there are 2 rows"),
        (lambda: Grid(2, 3).positions(columns=slice(4)), IndexError, "columns ends at 4, but there are 3 columns"),
        (lambda: Grid(2, 3).border(0), ValueError, "at least 1 patch thick, got 0"),
        (lambda: Grid(2, 3).box(0, 0, 3, 3), ValueError, r"got \(0, 0\) to \(3, 3\) as shares of its size"),
        (lambda: Grid(2, 3).box(5, 0, 5, 3, image=(9, 9)), ValueError, r"to \(5, 3\) in an image of 9×9 pixels"),
    ],
)
def test_what_is_no_grid_or_no_part_of_it(ask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask()
