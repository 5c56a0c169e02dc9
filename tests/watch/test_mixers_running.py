"""Mixers in one another, in training, in half precision, compiled, and unwatched: they run as they always do."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import regard
from regard.mixers import (
    DeltaRule,
    Facts,
    HiddenMap,
    Memory,
    MemoryAsContext,
    Moneta,
    SlidingWindow,
)
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer
from regard.runtime import looked_at
from tests.watch.mixers import (
    DIM,
    built,
    every_hidden_kind,
    every_kind,
    hybrid,
    matrix_of,
    text,
)


class Outer(ValueMixer):
    """Two mixers and a call of attention within a third one, which has a map or not."""

    facts = Facts(paper="", formula="", time="", state="")

    def __init__(self, mapped: bool) -> None:
        super().__init__(DIM)
        self.mapped = mapped
        self.one, self.other = DeltaRule(DIM, heads=2), SlidingWindow(DIM, heads=2, window=3)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        return self.one.project(x)

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.one.combine(projected)

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        x = projected["x"]
        heads = x[:, None]
        return self.one(x)[0] + self.other(x)[0] + F.scaled_dot_product_attention(heads, heads, heads)[:, 0]

    @property
    def hides_map(self) -> bool:
        return self.mapped


def test_mixers_in_mixers() -> None:
    x = text()
    for mapped, layers in ((True, ["0"]), (False, ["0.one", "0.other", "0"])):
        model = nn.Sequential(Outer(mapped)).double()
        with torch.no_grad(), regard.watch(model, regard.Received()) as seen:
            model(x)
        assert seen.layers == layers
        expected = matrix_of(model[0].one, x).sum(2)
        np.testing.assert_allclose(seen.dataset().received[0], expected, atol=1e-12)
    moneta = Moneta(DIM, heads=2).double()
    with (
        pytest.raises(RuntimeError, match="a mixer is seen where it has a map"),
        regard.watch(moneta, regard.Received()),
    ):
        moneta(x)
    context = MemoryAsContext(DIM, heads=2, segment=4, memory=Memory(depth=1)).double()
    with pytest.raises(ValueError, match="goes on from a state"), regard.watch(context, regard.Received()):
        context(x)


@every_hidden_kind
def test_training_is_left_as_it_was(kind: str) -> None:
    mixer, x = built(kind).train(), text()

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(run(x).square().sum(), list(mixer.parameters())))

    plain = gradients(lambda x: mixer(x)[0])
    with regard.watch(mixer, regard.Received(), regard.Rows([3]), keep_maps=True) as seen:
        found = gradients(lambda x: mixer(x)[0])
        again = gradients(lambda x: checkpoint(lambda x: mixer(x)[0], x, use_reentrant=False))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, found, again, strict=True))
    assert len(seen.maps[type(mixer).__name__]) == 2  # the checkpointed call is seen once
    assert all(parameter.grad is None for parameter in mixer.parameters())
    np.testing.assert_allclose(seen.dataset().received[0, 0], matrix_of(mixer, x).sum(2), atol=1e-12)


@every_kind
@pytest.mark.parametrize("context", ["inference", "autocast", "bfloat16"])
def test_other_ways_to_run(kind: str, context: str) -> None:
    half = context != "inference"
    mixer, x = built(kind), text()
    mixer, x = (mixer.float(), x.float()) if context == "autocast" else (mixer, x)
    mixer, x = (mixer.bfloat16(), x.bfloat16()) if context == "bfloat16" else (mixer, x)
    ways: dict[str, Any] = {
        "inference": torch.inference_mode, "bfloat16": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }  # fmt: skip
    with ways[context]():
        plain = mixer(x + 0)[0]
        with regard.watch(mixer, regard.Received(), regard.TopK(2)) as seen:
            assert torch.allclose(mixer(x + 0)[0], plain)
        with regard.watch(mixer, regard.Received(), heads=1) as one:
            mixer(x + 0)
    matrix = matrix_of(mixer.float() if half else mixer, x.float() if half else x)
    received = seen.dataset().received[0]
    assert received.dtype == ("float32" if half else "float64")
    np.testing.assert_allclose(one.dataset().received[0, :, 0], received[:, 1], rtol=1e-6)
    scale = np.abs(matrix).sum(2).max()
    np.testing.assert_allclose(received / scale, matrix.sum(2) / scale, atol=3e-2 if half else 1e-12)


def test_compiled_mixers() -> None:
    mixer, x = built("DeltaRule"), text()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], mixer(x)[0])
    with torch.no_grad(), regard.watch(compiled, regard.Received()) as seen:
        compiled(x)
    np.testing.assert_allclose(seen.dataset().received[0], matrix_of(mixer, x).sum(2), atol=1e-12)


def test_every_call_in_the_block_and_long_texts_read_in_pieces() -> None:
    one, other, x = built("DeltaRule"), nn.Sequential(built("SlidingWindow")), text(1, 2500)
    with torch.no_grad(), regard.watch(regard.Received(), regard.At("own")) as seen:
        one(x)
        other(x)
    assert seen.layers == ["DeltaRule", "Sequential.0"]
    for number, mixer in enumerate((one, other[0])):
        matrix = matrix_of(mixer, x)
        np.testing.assert_allclose(seen.dataset().received[number], matrix.sum(2), atol=1e-10)
        np.testing.assert_allclose(seen.dataset()["at"][number, ..., 0], np.diagonal(matrix, 0, 2, 3), atol=1e-12)


def test_nothing_is_left_behind() -> None:
    model, x = hybrid(), text()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    maps: list[Tensor] = []
    original = DeltaRule.hidden_map

    def counted(self: DeltaRule, projected: Projected, *others: Any) -> HiddenMap:
        maps.append(projected.value)
        return original(self, projected, *others)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(DeltaRule, "hidden_map", counted)
        with regard.watch(model, regard.Received()):
            model(x)
        assert len(maps) == 1
        model(x)
        assert len(maps) == 1  # made for who looks alone
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not looked_at()
