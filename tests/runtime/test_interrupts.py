"""An interrupt anywhere in a block leaves nothing behind, and the next pass is one of its own."""

import asyncio
import copy
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import CausalBias

import regard
from regard.runtime import interceptors


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """PyTorch's own blocks may be interrupted where they end."""
    yield
    torch.set_grad_enabled(True)


class Stop(KeyboardInterrupt):
    """Raised by nobody else."""


class Interrupted(nn.Module):
    """Two layers, between which an interrupt may come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.interrupt: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x, x, x, need_weights=False)[0]
        if self.interrupt is not None:
            raise self.interrupt
        return self.second(x, x, x, need_weights=False)[0]


def in_place() -> list[Any]:
    """What a block changes in the process."""
    from torch._dynamo import eval_frame

    return [
        torch.backends.mha.get_fastpath_enabled, vars(CausalBias)["_dispatch"], eval_frame._stance,
        functional.multi_head_attention_forward, threading.Thread.start, interceptors(),
    ]  # fmt: skip


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, RuntimeError])
def test_the_pass_after_an_interrupt_is_its_own(interrupt: type[BaseException]) -> None:
    model, x = Interrupted().eval(), torch.randn(1, 5, 8)
    with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
        for interrupted in (False, True, True, False):
            model.interrupt = interrupt if interrupted else None
            try:
                model(x)
            except interrupt:
                assert interrupted
    assert seen.layers == ["first", "second"]
    entropy = torch.as_tensor(seen.dataset().entropy.values)
    assert entropy.shape[:2] == (4, 2)
    assert not entropy[:, 0].isnan().any()
    assert entropy[[0, 3], 1].isfinite().all()


def test_a_model_copied_in_a_block_carries_nothing_along() -> None:
    model, x = Interrupted().eval(), torch.randn(1, 5, 8)
    plain = model(x)
    with torch.no_grad(), regard.steer(model, regard.Gate(2.0)), regard.watch(model, regard.Entropy()) as seen:
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(x), plain)
        model(x)
    assert "pass" not in seen.dataset().dims
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())


def test_an_interrupt_in_the_midst_of_a_call() -> None:
    model, x, stop = Interrupted().eval(), torch.randn(1, 5, 8), True

    class Stopping(regard.Statistic):
        name, dims = "nothing", ("query",)

        def measure(self, attention: Any, call: Any) -> Tensor:
            if stop:
                raise Stop
            return attention.max()

    with torch.no_grad(), regard.watch(model, Stopping()) as seen:
        with pytest.raises(Stop):
            model(x)
        stop = False
        model(x)
    assert seen.layers == ["first", "second"]


IN_BLOCKS = ("regard/runtime", "regard/watch", "contextlib.py")


def interrupted_at(line: int, work: Callable[[], None], files: tuple[str, ...] = IN_BLOCKS) -> bool:
    """Run it, with an interrupt at the so many-th line of what runs a block; whether there are so many."""
    lines = itertools.count(1)

    def at_line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and next(lines) == line:
            sys.settrace(None)
            raise Stop
        return at_line

    def at_call(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return at_line if any(part in name for part in files) else None

    before = sys.gettrace()
    try:
        sys.settrace(at_call)
        work()
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line() -> None:
    """Every 61st, that is; another call of attention puts back what a block that was lost had no time to."""
    model, x, q = Interrupted().eval(), torch.randn(1, 5, 8), torch.randn(1, 1, 2, 8)
    plain, before = model(x), in_place()

    def work() -> None:
        with torch.no_grad(), regard.steer(model, regard.Gate(2.0)), regard.watch(model, regard.Entropy()):
            model(x)

    interrupted = 0
    for line in itertools.count(1, 61):
        if not interrupted_at(line, work):
            break
        interrupted += 1
        gc.collect()
        torch.set_grad_enabled(True)  # which PyTorch's own block may have had no time to
        functional.scaled_dot_product_attention(q, q, q)
        assert in_place() == before, line
        assert torch.equal(model(x), plain), line
        with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
            model(x)
        assert seen.layers == ["first", "second"], line
        assert "pass" not in seen.dataset().dims, line
    assert interrupted > 10


def test_an_interrupt_keeps_no_lock() -> None:
    """At every line of what arranges blocks: another thread enters one of its own all the same."""
    before, q, entered = in_place(), torch.randn(1, 1, 2, 8), []

    def work() -> None:
        with pytest.raises(RuntimeError, match="no attention call"), regard.steer(None, regard.Gate(2.0)):
            pass

    def other() -> None:
        with regard.steer(None, regard.Gate(0)):
            entered.append(bool(functional.scaled_dot_product_attention(q, q, q).any()))

    lines = 0
    for line in itertools.count(1):
        if not interrupted_at(line, work, ("runtime/seams.py",)):
            break
        lines += 1
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), line
        gc.collect()
        functional.scaled_dot_product_attention(q, q, q)
        assert in_place() == before, line
    assert lines > 10
    assert entered == [False] * lines
