"""SmolLM2-135M-Instruct, loaded once, where `make real` has brought it."""

from typing import Any

import pytest
from torch.nn import Module

from bench import real_model
from regard.models import load


@pytest.fixture(scope="session")
def smollm() -> tuple[Module, Any]:
    """The pretrained model, as a language model, and its tokenizer."""
    if not real_model.path().is_file():
        pytest.skip(f"the pretrained model is not at {real_model.path()}: `make real` fetches it")
    return load(real_model.path(), language=True)
