"""Queries, keys, values and the matrix of every call that a model of transformers makes of its own eager attention."""

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass
class Recorded:
    """One call: what went in, and the probabilities and output (B, N, H, D) that the model's own code made of it."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    matrix: Tensor
    output: Tensor


def recorded(model: Any, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Run the model, and take what passes through ``eager_attention_forward`` of its own file."""
    file, calls = sys.modules[type(model).__module__], []
    own = file.eager_attention_forward

    def eager(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **others: Any
    ) -> tuple[Tensor, Tensor]:
        output, matrix = own(module, query, key, value, mask, scaling=scaling, **others)
        calls.append(Recorded(module, query, key, value, mask, scaling, matrix, output))
        return output, matrix

    monkeypatch.setattr(file, "eager_attention_forward", eager)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(inputs, use_cache=False)
    return calls
