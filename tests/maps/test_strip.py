"""A strip's arithmetic is the same, compiled or not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from regard import AttentionMap, masks
from regard.maps import _strip, _tiled

LOOPS = (_tiled._answer_strips, _tiled._add_strips, _strip.answer, _strip.backward)


@pytest.mark.parametrize("function", LOOPS)
def test_keeps_to_what_torchscript_compiles(function: Any) -> None:
    assert isinstance(_strip.unlocked(function), torch.jit.ScriptFunction)


def everything(rule: masks.Mask | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    q, k, v, weights = (
        torch.randn(2, heads, 300, width, generator=generator).requires_grad_()
        for heads, width in ((4, 8), (2, 8), (2, 5), (4, 3))
    )
    sinks = torch.randn(4, generator=generator).requires_grad_()
    call: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "softcap": 30.0, "sinks": sinks, "mask": rule}
    differentiable = AttentionMap(4 * q, k, **call)
    answers = [differentiable @ v, differentiable.T @ weights, differentiable.entropy()]
    answers += torch.autograd.grad([answer.square().sum() for answer in answers], (q, k, v, weights, sinks))
    with torch.no_grad():
        A, segments = (
            AttentionMap(4 * q, k, **call),
            {"two": [0, 3], "none": torch.zeros(300, dtype=torch.bool), "every third": slice(1, 200, 3)},
        )
        A.expect("mass", segments)
        A.expect("entropy")
        blocks = torch.arange(300) // 7
        A.expect("block_sums", blocks, blocks)
        A.expect("mean_distance")
        sums = A.block_sums(blocks, blocks)
        return [*answers, A.received(), A.mass(segments), A.entropy(), sums, A.mean_distance()]


@pytest.mark.parametrize("rule", [None, masks.window(70, 5) | masks.prefix(9)])
def test_where_torchscript_is_missing_the_functions_themselves_answer(
    rule: masks.Mask | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = everything(rule)

    def gone(function: Any) -> None:
        raise RuntimeError("no TorchScript here")

    monkeypatch.setattr(torch.jit, "script", gone)
    _strip.unlocked.cache_clear()
    try:
        for answer, other in zip(everything(rule), compiled, strict=True):
            assert torch.equal(answer, other)
    finally:
        _strip.unlocked.cache_clear()
