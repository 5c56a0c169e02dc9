"""KeyboardInterrupt at any line of a block: afterwards everything is as it was before.

python -m fuzz.interrupts [--minutes 5] [--seed SEED]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import regard
from fuzz.drawing import Check, main

PACKAGE = str(regard.__path__[0])


@cache
def model() -> Any:
    """The bundled one, whatever is done to it."""
    return regard.mini()[0]


@contextmanager
def interrupted_after(lines: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at a line of regard's own, as Ctrl-C would between two of them; yields the lines so far."""
    passed = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            passed[0] += 1
            if passed[0] == lines:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


def blocks(draw: random.Random) -> AbstractContextManager[Any]:
    """A block of any kind around the model."""
    match draw.choice(("watch", "steer", "compress", "capture")):
        case "watch":
            return regard.watch(model(), regard.Entropy(), regard.Received(), share=draw.random() < 0.5)
        case "steer":
            return regard.steer(model(), regard.Reweight([0], 2.0), regard.Gate(0.5, heads=[1]))
        case "compress":
            return regard.compress(model(), regard.cache.SnapKV(budget=8, window=4))
    return regard.capture(model())


def work(ids: Tensor) -> None:
    """What is done in a block: a prompt, and a few tokens after it."""
    model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


def state(of: nn.Module) -> dict[str, Any]:
    """What a block may have changed: functions, hooks, attributes, the way attention is computed."""
    found: dict[str, Any] = {
        "function": torch.nn.functional.scaled_dot_product_attention,
        "builtin": torch._C._nn.scaled_dot_product_attention,
        "implementation": model().config._attn_implementation,
        "grad": torch.is_grad_enabled(),
    }
    for name, module in of.named_modules():
        hooks = [len(table) for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
        found[name] = (hooks, sorted(vars(module)), module.__dict__.get("forward"))
    return found


def nested(draw: random.Random) -> str:
    """One to three blocks, entered, used and left, with an interrupt anywhere."""
    of, ids = model(), torch.randint(3, 2000, (1, 24))
    with torch.inference_mode():
        plain, before = of(ids).logits, state(of)
        lines = int(10 ** draw.uniform(0, 4.7))
        made = [blocks(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
        stopped = True
        try:
            with interrupted_after(lines):
                run(made, ids)
                stopped = False
        except KeyboardInterrupt:
            pass
        except ValueError:  # blocks that exclude each other say so; that must leave nothing either
            stopped = False
        after = state(of)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        if changed:
            raise AssertionError(f"after an interrupt at line {lines}: changed are {changed}")
        if not torch.equal(of(ids).logits, plain):
            raise AssertionError(f"after an interrupt at line {lines}: the plain model gives other logits")
        with regard.watch(of, regard.Received()) as seen:
            of(ids)
        total = float(torch.tensor(seen.dataset().received.values).sum(-1).sub(24).abs().max())
        if total > 1e-3:
            raise AssertionError(f"after an interrupt at line {lines}: a new recording is off by {total}")
    return f"{len(made)} blocks, line {lines}, {'stopped' if stopped else 'ran through'}"


def run(made: list[AbstractContextManager[Any]], ids: Tensor) -> None:
    """Within all blocks, the first outermost."""
    if not made:
        work(ids)
        return
    with made[0]:
        run(made[1:], ids)


CHECKS: dict[str, Check] = {"nested": nested}

if __name__ == "__main__":
    main("fuzz.interrupts", __doc__, CHECKS)
