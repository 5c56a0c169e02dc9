"""Compiled models run uncompiled in blocks and compiled after them, however the blocks overlap: R7."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.functional import scaled_dot_product_attention

import regard

X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))


class Compiled:
    """A compiled model that counts how often it was compiled and how often what was compiled ran."""

    def __init__(self, backend: str) -> None:
        class Model(nn.Module):  # a class of its own: what was compiled of one is nothing that another may find
            def __init__(self) -> None:
                super().__init__()
                self.project = nn.Linear(8, 24)

            def forward(self, x: Tensor) -> Tensor:
                query, key, value = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
                return scaled_dot_product_attention(query, key, value)

        self.compilations = self.runs = 0
        self.plain = Model().eval()
        self.model: Any = torch.compile(self.plain, backend=self._backend(lookup_backend(backend)))
        self.expected = self.run()

    def _backend(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            self.compilations += 1
            compiled = compiler(graph, inputs)

            def run(*args: Any) -> Any:
                self.runs += 1
                return compiled(*args)

            return run

        return backend

    def run(self) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.model(X)
        return output

    def runs_compiled(self) -> bool:
        """And as it was compiled at first."""
        before = self.runs
        torch.testing.assert_close(self.run(), self.expected)
        return self.runs == before + 1 and self.compilations == 1


@pytest.fixture(params=["eager", "aot_eager"])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[Compiled, Compiled]]:
    torch.compiler.reset()
    yield Compiled(request.param), Compiled(request.param)
    torch.compiler.reset()


def seen_uncompiled(one: Compiled, seen: regard.Recording) -> bool:
    runs = one.runs
    one.run()
    return one.runs == runs and bool(seen.layers)


def test_interleaved_blocks(models: tuple[Compiled, Compiled]) -> None:
    one, other = models
    stance = eval_frame._stance
    for first_left in (0, 1):
        blocks = [ExitStack(), ExitStack()]
        seen = [
            block.enter_context(regard.watch(model.model, regard.Entropy()))
            for block, model in zip(blocks, models, strict=True)
        ]
        assert seen_uncompiled(one, seen[0])
        assert seen_uncompiled(other, seen[1])
        blocks[first_left].close()
        left = 1 - first_left
        assert seen_uncompiled(models[left], seen[left])
        blocks[left].close()
        assert eval_frame._stance is stance
        assert one.runs_compiled()
        assert other.runs_compiled()


@pytest.mark.parametrize("way", ["watch", "steer"])
def test_blocks_of_two_threads(models: tuple[Compiled, Compiled], way: str) -> None:
    """The first to be entered is the first to be left, while the other is open."""
    stance, wrong = eval_frame._stance, list[object]()
    entered, left = [threading.Event(), threading.Event()], threading.Event()

    def block(number: int) -> None:
        model = models[number]
        try:
            edit = regard.watch(model.model, regard.Entropy()) if way == "watch" else None
            with edit or regard.steer(model.model, regard.Gate(2.0)):
                entered[number].set()
                assert entered[1 - number].wait(60)
                runs = model.runs
                output = model.run()
                assert model.runs == runs
                torch.testing.assert_close(output, model.expected * (1 if way == "watch" else 2))
                assert number == 0 or left.wait(60)
                if number:
                    model.run()
                    assert model.runs == runs
        except BaseException as error:
            wrong.append(error)
        left.set()

    threads = [threading.Thread(target=block, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert eval_frame._stance is stance
    assert all(model.runs_compiled() for model in models)


def test_a_stance_of_the_users_own_is_put_back(models: tuple[Compiled, Compiled]) -> None:
    one, _ = models
    with torch.compiler.set_stance("eager_on_recompile"):
        stance = eval_frame._stance
        with regard.watch(one.model, regard.Entropy()) as seen:
            assert seen_uncompiled(one, seen)
        assert eval_frame._stance is stance
    assert one.runs_compiled()


def test_a_model_that_is_compiled_in_a_block(models: tuple[Compiled, Compiled]) -> None:
    with regard.watch(models[0].plain, regard.Entropy()):
        models[0].run()
        late = Compiled("eager")
        assert late.compilations == 0
    late.run()
    assert late.compilations == late.runs == 1


FIRST = """
import torch, regard
from torch._C import _nn

class Model(torch.nn.Module):
    def forward(self, x):
        return _nn.scaled_dot_product_attention(x, x, x)

model, x, compile = Model(), torch.randn(1, 2, 6, 8), torch.compile
for _ in range(2):
    with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
        torch.compile(model, backend="aot_eager")(x)
    assert seen.layers == ["Model"]
    assert torch.compile is compile

from torch._dynamo import eval_frame
assert eval_frame._stance.stance == "default"
"""


def test_the_first_model_that_is_compiled_in_a_process() -> None:
    """Before which there is no compiler to be told."""
    ran = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
