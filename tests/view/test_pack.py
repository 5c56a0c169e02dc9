"""How well numbers survive in one byte."""

import base64
from typing import Any

import numpy as np

from regard.view.pack import MISSING, STEPS, pack


def unpack(packed: dict[str, Any]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(packed["codes"]), np.uint8).reshape(-1, packed["size"])
    low, high = (np.array(packed[name])[:, None] for name in ("low", "high"))
    values = low * (high / low) ** ((codes.astype(float) - 1) / STEPS)
    return np.where(codes == MISSING, np.nan, np.where(codes == 0, 0, values))


def test_numbers_come_back_within_three_percent() -> None:
    generator = np.random.default_rng(0)
    values = generator.lognormal(0, 1.2, size=(50, 300))
    values[:, 0] = 2000
    np.testing.assert_allclose(unpack(pack(values)), values, rtol=0.03)


def test_nothing_and_missing_stay_apart() -> None:
    values = np.array([[0.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(unpack(pack(values)), values, rtol=1e-3)


def test_what_is_far_below_the_largest_counts_as_nothing() -> None:
    assert unpack(pack(np.array([[1e-30, 1.0]])))[0].tolist() == [0.0, 1.0]
