"""One seed, one thread and one hypothesis profile: what a test finds depends on neither chance, machine nor order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; the workers share the cores

import random

import hypothesis
import numpy as np
import pytest
import torch

# `make fuzz` is where new cases are drawn; here each run has the cases of the one before.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("fixed")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every generator that belongs to the process, as a fresh one with a seed would have it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(True)  # an interrupt in a test may come where PyTorch's own block ends
