"""Every test and every doctest starts from one seed, so that none depends on which ran before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """PyTorch's generator, as a fresh process of the user would set it."""
    torch.manual_seed(0)
