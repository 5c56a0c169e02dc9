"""Where flash-linear-attention and a GPU are, its kernels are called, as they want to be: here by a stand-in for both."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from regard.mixers import DeltaRule, GatedDeltaRule, GatedLinearAttention, Mixer, delta_rule, linear_attention
from regard.mixers.linear import _fla_kernels

NAMES = ["delta_rule", "gated_delta_rule", "gla"]
HALF = torch.bfloat16


class Kernels:
    """Which take tokens before heads, divide queries by √D unless told, and return the state only where it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def run(self, name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        self.calls.append((name, dict(given)))
        q, k, v = (given[part].transpose(1, 2).float() for part in "qkv")
        q = q * (q.shape[3] ** -0.5 if given.get("scale") is None else given["scale"])
        state = given.get("initial_state")
        decay = given["g"].transpose(1, 2).float() if "g" in given else None
        if name == "gla":
            output, after = linear_attention(q, k, v, decay, state, form="recurrent")
        else:
            beta = given["beta"].transpose(1, 2).float()
            output, after = delta_rule(q, k, v, beta, state, log_decay=decay, form="recurrent")
        return output.transpose(1, 2).to(given["v"]), after if given.get("output_final_state") else None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The package, and a GPU that is this processor."""
    found = Kernels()
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in NAMES:
        module: Any = ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", lambda name=name, **given: found.run(name, given))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_fla_kernels, "_on_gpu", lambda tensor: True)
    _fla_kernels._imported.cache_clear()
    yield found
    _fla_kernels._imported.cache_clear()


def inputs(name: str, tokens: int = 9) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Arguments of the function of that kernel, in bfloat16."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, tokens, 4).to(HALF)
    v, state = torch.randn(2, 3, tokens, 5).to(HALF), torch.randn(2, 3, 4, 5)
    if name == "gla":
        return [q, k, v, logsigmoid(torch.randn(2, 3, tokens, 4)), state], {}
    decay = {"log_decay": logsigmoid(torch.randn(2, 3, tokens))} if name == "gated_delta_rule" else {}
    return [q, normalize(k, dim=-1), v, torch.rand(2, 3, tokens), state], decay


@pytest.mark.parametrize("name", NAMES)
def test_called_with_their_layout_and_scale(name: str, kernels: Kernels) -> None:
    function: Any = linear_attention if name == "gla" else delta_rule
    arguments, decay = inputs(name)
    expected, expected_state = function(*(part.double() for part in arguments), **decay, form="recurrent")
    found, state = function(*arguments, **decay)
    ((called, given),) = kernels.calls
    assert called == name
    assert (found.dtype, found.shape, state.dtype) == (HALF, (2, 3, 9, 5), torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(state.double(), expected_state, atol=1e-5, rtol=1e-5)
    assert given["q"].shape == (2, 9, 3, 4)
    assert all(given[part].is_contiguous() and given[part].dtype == HALF for part in "qkv")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", [{"chunk": 4}, {"form": "recurrent"}, {"form": "parallel"}])
def test_not_where_another_way_is_asked_for(name: str, choice: dict[str, Any], kernels: Kernels) -> None:
    function: Any = linear_attention if name == "gla" else delta_rule
    arguments, decay = inputs(name)
    function(*arguments, **decay, **choice)
    assert not kernels.calls


@pytest.mark.parametrize("name", NAMES)
def test_not_where_they_do_not_fit(name: str, kernels: Kernels) -> None:
    """In float32, whose digits they would not keep; of one token; of keys that are too wide; with no decay of channels."""
    function: Any = linear_attention if name == "gla" else delta_rule
    arguments, decay = inputs(name)
    function(*(part.float() for part in arguments), **decay)
    one, gate = inputs(name, 1)
    function(*one, **gate)
    wide = [torch.randn(1, 1, 3, 257).to(HALF) for _ in range(3)]
    function(*wide, -torch.rand(1, 1, 3, 257) if name == "gla" else torch.rand(1, 1, 3))
    linear_attention(*arguments[:3], -torch.rand(2, 3, 9))
    assert not kernels.calls


@pytest.mark.parametrize("mixer", [DeltaRule(16), GatedDeltaRule(16), GatedLinearAttention(16)])
def test_layers_go_through_them(mixer: Mixer, kernels: Kernels) -> None:
    """Beside padding too; what decodes goes on from the state that they return."""
    mixer, x = mixer.to(HALF), torch.randn(2, 12, 16).to(HALF)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :3] = False
    with torch.no_grad():
        found, state = mixer(x, mask=mask)
        step, _ = mixer.decode(x[:, 0], state)
        assert len(kernels.calls) == 1
        exact = mixer.float()
        expected, after = exact(x.float(), mask=mask)
        torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=3e-2)
        torch.testing.assert_close(step.float(), exact.decode(x[:, 0].float(), after)[0], atol=3e-2, rtol=3e-2)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    _fla_kernels._imported.cache_clear()
    assert _fla_kernels._imported("gla") is None
    _fla_kernels._imported.cache_clear()


def test_a_package_that_cannot_be_imported_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr("importlib.import_module", missing)
    _fla_kernels._imported.cache_clear()
    with pytest.warns(
        UserWarning, match=r"cannot be imported \(No module named 'einops'\): mixers do without its kernels"
    ):
        assert _fla_kernels._imported("gla") is None
    _fla_kernels._imported.cache_clear()
