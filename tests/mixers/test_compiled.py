"""Every layer compiles as one graph, forth and back, and gives what it gives otherwise."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.mixers import DeltaRule, Mixer, catalogue
from regard.mixers import mixer as mixer_module

ARGUMENTS: dict[str, dict[str, Any]] = {"MemoryAsContext": {"segment": 4}} | {
    name: {"window": 4} for name in ("Based", "LongVQ", "MemoryAsGate", "MemoryAsLayer", "SlidingWindow")
}
MECHANISMS = ["DeltaRule", "FAST", "LightningAttention", "LongTermMemory", "MemoryAsContext", "SelectiveSSM"]


def made(name: str) -> Mixer:
    torch.manual_seed(0)
    return catalogue.mixers()[name](8, **ARGUMENTS.get(name, {}))


def with_gradients(run: Any, mixer: Mixer, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of tokens and weights."""
    x = x.clone().requires_grad_()
    y, _ = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()], materialize_grads=True)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("name", sorted(catalogue.mixers()))
def test_one_graph(name: str) -> None:
    mixer, x = made(name), torch.randn(2, 4, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(with_gradients(compiled, mixer, x), with_gradients(mixer, mixer, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MECHANISMS)
def test_one_graph_after_a_state_and_beside_padding(name: str) -> None:
    """What texts have read, and which tokens are real, is not looked at."""
    mixer, x = made(name), torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 3, 8))
        expected, end = mixer(x, state, mask)
        found, after = compiled(x, state, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for part, tensor in end.tensors.items():
        torch.testing.assert_close(after.tensors[part], tensor, atol=1e-5, rtol=1e-4)


def test_a_long_text_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer_module, "_TRAINED", 1)
    monkeypatch.setattr(mixer_module, "_SMALLEST_PIECE", 4)
    mixer, x = made("DeltaRule"), torch.randn(2, 6, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for found, expected in zip(with_gradients(compiled, mixer, x), with_gradients(mixer, mixer, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_compiled_layer_is_watched_as_it_is() -> None:
    """It runs uncompiled inside the block."""
    mixer, x = DeltaRule(8, heads=2), torch.randn(1, 6, 8)
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        with regard.watch(compiled, regard.Received()) as seen:
            compiled(x)
    torch.testing.assert_close(
        torch.as_tensor(seen.dataset().received.values[0]), mixer.map(x).dense().sum(2), atol=1e-5, rtol=1e-4
    )
