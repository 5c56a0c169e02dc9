"""Policies take the arguments that mean something to them, and no others: none refuses what its signature has."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from inspect import isabstract
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.cache import (
    Adaptive,
    AfterPrompt,
    BudgetPolicy,
    ByLayer,
    Drop,
    Every,
    Merge,
    Policy,
    Pyramid,
    SnapKV,
    Unread,
)
from regard.cache._part import Part
from regard.cache.trial import read_policy
from tests.cache.conftest import decoder, texts


def peaked() -> Any:
    """A decoder each of whose heads attends to few tokens, and to others than its neighbours."""
    model = decoder("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(16)
    return model


LLAMA = peaked()
POLICIES: list[type[Policy]] = [
    kind
    for kind in (getattr(regard.cache, name) for name in regard.cache.__all__)
    if isinstance(kind, type) and issubclass(kind, Policy) and not isabstract(kind)
]
# Values beside the default of each argument, by policy where they differ. One that is missing here fails.
OTHERS: dict[str, list[Any]] = {
    "average": [True],
    "covariance": [False],
    "epsilon": [0.0, 0.5],
    "filters": [torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))],
    "first": [0.0, 1.0],
    "future": [1],
    "length": [3],
    "neighbours": [1],
    "policy": [SnapKV(budget=10, window=2)],
    "values": [False],
    "budget": [0.5, 300],
    "BudgetPolicy.budget": [
        0.5,
        300,
        Pyramid(10),
        ByLayer(10, [0.5, 1.0, 1.5]),
        Adaptive(10),
        Adaptive(ByLayer(0.5, [1, 1, 1])),
    ],
    "heads": [{}, {0: [0], 1: [0, 1]}],
    "heterogeneous": [(0.0, 1.0)],
    "image": [[1, 2], slice(0, 3)],
    "kernel": [1, 9],
    "layer": [1, 3],
    "pooling": ["max"],
    "rest": [Drop(), Merge(seed=3), Unread()],
    "when": [AfterPrompt(), Every(1), Every(2), Every(2, prompt=False)],
    "recent": [7],
    "ObservedAttention.recent": [0.0, 0.25],
    "seed": [3],
    "sinks": [0, 2],
    "strongest": [9],
    "threshold": [0.0, 1.0],
    "window": [1, 8],
}
# Small enough for a text of 24 tokens.
SMALL: dict[str, dict[str, Any]] = {
    "QFilters": {"filters": torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))},
    "RetrievalHeads": {"sinks": 2, "heads": {0: [0]}},
    "SnapKV": {"window": 2},
    "TaskKV": {"sinks": 2, "recent": 2, "window": 4},
}


def required(kind: type[Policy]) -> dict[str, Any]:
    return {f.name: OTHERS[f.name][-1] for f in fields(kind) if f.default is MISSING}


def others(kind: type[Policy], argument: str) -> list[Any]:
    named = [f"{base.__name__}.{argument}" for base in kind.__mro__]
    return next(OTHERS[name] for name in (*named, argument) if name in OTHERS)


def given(base: type[Policy]) -> Iterator[Any]:
    """Policies of this kind, each argument, and a value beside its default."""
    for kind in POLICIES:
        for argument in fields(kind) if issubclass(kind, base) else ():
            for value in others(kind, argument.name):
                if value != argument.default:
                    yield pytest.param(kind, argument.name, value, id=f"{kind.__name__}({argument.name}={value})")


def test_all_policies_are_tried() -> None:
    assert len(POLICIES) == 18


@pytest.mark.parametrize(("kind", "argument", "value"), list(given(Policy)))
def test_what_the_signature_has_is_taken(kind: type[Policy], argument: str, value: Any) -> None:
    policy = kind(**required(kind) | SMALL.get(kind.__name__, {}) | {argument: value})
    assert getattr(policy, argument) is value
    written = f"<{tuple(value.shape)}>" if isinstance(value, Tensor) else repr(value)
    written = str(value) if isinstance(value, Part) else written
    assert (written if argument == "policy" else f"{argument}={written}") in str(policy)


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)
def test_what_is_printed_is_read_again(kind: type[Policy]) -> None:
    """With every argument another than by default that can be written as text."""
    arguments = {f.name: others(kind, f.name)[-1] for f in fields(kind)}
    if any(isinstance(value, Tensor) for value in arguments.values()):
        return
    policy = kind(**arguments)
    assert read_policy(str(policy)) == policy


def kept(policy: Policy) -> list[Tensor]:
    """What is left of a prompt, and again after three decoding steps, by layer."""
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        past = LLAMA(**texts(24)).past_key_values
        after_prompt = cache.report().layers
        for token in range(3):
            LLAMA(torch.full((1, 1), 3 + token), past_key_values=past)
    return [layer.positions for layer in (*after_prompt, *cache.report().layers)]


ALIKE = ("CaM", "RetrievalHeads", "StreamingLLM", "TOVA")  # whose scores are alike in all heads


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        case
        for case in given(BudgetPolicy)
        if case.values[1] in ("budget", "when")
        and not (case.values[0].__name__ in ALIKE and isinstance(case.values[2], Adaptive))
    ],
)
def test_what_is_taken_changes_what_is_kept(kind: type[Policy], argument: str, value: Any) -> None:
    """So an argument that a policy has no use for is not taken and ignored either."""
    usual = {"budget": 10, "when": Every(3, prompt=False)} | SMALL.get(kind.__name__, {})
    before, after = kept(kind(**usual)), kept(kind(**usual | {argument: value}))
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
