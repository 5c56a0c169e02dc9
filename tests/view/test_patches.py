"""What a summary says about heads that look from patch to patch in a known way."""

import numpy as np
import pytest
import xarray as xr

from regard.inputs import Picture
from regard.questions import NEIGHBOURS
from regard.view.patches import is_of_patches, patch_statistics

ROWS, COLUMNS = 5, 6
TOKENS = 1 + ROWS * COLUMNS  # a class token first
PICTURE = Picture(b"", ROWS, COLUMNS, tuple(range(1, TOKENS)))


def even() -> np.ndarray:
    return np.full((TOKENS, TOKENS), 1 / TOKENS)


def beside(down: int, across: int, share: float = 0.7) -> np.ndarray:
    """Give a share to the patch beside each, where there is one, and the rest evenly to all."""
    targets = PICTURE.shifted(down, across, TOKENS)
    matrix = (1 - share) * even()
    for query, key in enumerate(targets.tolist()):
        matrix[query, key if key >= 0 else query] += share
    return matrix


def around() -> np.ndarray:
    matrix = 0.1 * even()
    shifts = [(0, 0), *NEIGHBOURS.values()]
    for query in range(TOKENS):
        keys = [int(PICTURE.shifted(*shift, TOKENS)[query]) for shift in shifts]
        there = [key for key in keys if key >= 0] or [0]
        matrix[query, there] += 0.9 / len(there)
    return matrix


def far() -> np.ndarray:
    """Look at a patch two rows and three columns away, half the time."""
    return (even() + np.roll(np.eye(TOKENS), 2 * COLUMNS + 3, axis=1)) / 2


def to_the_class_token() -> np.ndarray:
    matrix = 0.4 * even()
    matrix[:, 0] += 0.6
    return matrix


HEADS = {
    "broad": even(),
    "own-patch": beside(0, 0),
    "neighbour": beside(0, -1),
    "surroundings": around(),
    "class-token": to_the_class_token(),
    "mixed": far(),
}


def record(matrix: np.ndarray) -> xr.Dataset:
    """What a report asks of one head, from its matrix."""
    dims = ("layer", "batch", "head")
    shifts = {"own patch": (0, 0), **NEIGHBOURS}
    at = np.full((TOKENS, len(shifts)), np.nan)
    for number, shift in enumerate(shifts.values()):
        for query, key in enumerate(PICTURE.shifted(*shift, TOKENS).tolist()):
            if key >= 0:
                at[query, number] = matrix[query, key]
    variables = {
        "entropy": ((*dims, "query"), -(matrix * np.log(matrix)).sum(-1)[None, None, None]),
        "received": ((*dims, "key"), matrix.sum(0)[None, None, None]),
        "mass": ((*dims, "query", "segment"), matrix[:, :1][None, None, None]),
        "at": ((*dims, "query", "target"), at[None, None, None]),
        "grid_distance": ((*dims, "query"), np.full((1, 1, 1, TOKENS), 2.0)),
    }
    return xr.Dataset(variables, {"target": list(shifts), "segment": ["sink"], "layer": ["encoder.0"], "head": [0]})


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_gets_its_kind(kind: str) -> None:
    summary = patch_statistics(record(HEADS[kind]))
    assert summary["kind"].item() == kind


def test_the_numbers_are_means_over_the_patches_that_have_the_target() -> None:
    summary = patch_statistics(record(HEADS["neighbour"]))
    assert summary["direction"].item() == "left"
    assert summary["neighbour"].item() == pytest.approx(0.7 + 0.3 / TOKENS)
    assert summary["score"].item() == summary["neighbour"].item()
    assert summary["class_token"].item() == pytest.approx((0.3 / TOKENS * TOKENS + 0.7) / TOKENS)
    assert summary["broad"].item() < 0.5


def test_surroundings_are_all_nine_patches() -> None:
    matrix = HEADS["surroundings"]
    shifts = [(0, 0), *NEIGHBOURS.values()]
    kept = [
        sum(matrix[query, int(key)] for shift in shifts if (key := PICTURE.shifted(*shift, TOKENS)[query]) >= 0)
        for query in range(1, TOKENS)
    ]
    assert patch_statistics(record(matrix))["surroundings"].item() == pytest.approx(np.mean(kept))


def test_texts_are_not_of_patches() -> None:
    assert is_of_patches(record(even()))
    assert not is_of_patches(record(even()).drop_vars("grid_distance"))
