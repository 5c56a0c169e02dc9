"""The map by which each token keeps what it holds."""

import pytest
import torch

from regard.maps import Identity
from tests.maps.answers import check_answers


def test_answers() -> None:
    I = Identity(2, 3, 5, torch.float64)  # noqa: E741
    check_answers(I, torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5))
    assert I.has_probability_rows
    assert not I.entropy().any()
    assert I.heads([2, 2]).shape == (2, 2, 5, 5)
    with pytest.raises(IndexError, match="heads names position 3"):
        I.heads([3])
