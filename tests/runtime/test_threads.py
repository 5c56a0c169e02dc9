"""Which threads and tasks a block belongs to, and that the others run on unharmed beside it."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

import regard
from tests.watch.test_models import built


@contextmanager
def beside(work: Callable[[], bool], threads: int = 8) -> Iterator[list[object]]:
    """Threads that do some work over and over, and what went wrong there: errors, or that it told False."""
    wrong: list[object] = []
    stop = threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                if not work():
                    wrong.append("another answer")
        except Exception as error:
            wrong.append(error)

    running = [threading.Thread(target=loop) for _ in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in running:
            thread.start()
        yield wrong
    finally:
        stop.set()
        for thread in running:
            thread.join()
        sys.setswitchinterval(interval)


def test_blocks_open_and_close_beside_busy_threads() -> None:
    q = torch.randn(1, 2, 8, 8)
    plain = scaled_dot_product_attention(q, q, q)
    with beside(lambda: torch.equal(scaled_dot_product_attention(q, q, q), plain)) as wrong:
        for _ in range(60):
            with regard.watch(regard.Entropy()) as seen:
                scaled_dot_product_attention(q, q, q)
            assert seen.dataset().sizes["query"] == 8
            with regard.steer(None, regard.Gate(2.0)):
                torch.testing.assert_close(scaled_dot_product_attention(q, q, q), 2 * plain)
    assert not wrong


def test_weights_are_returned_in_other_threads() -> None:
    module, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 1, 8)
    with torch.no_grad():
        plain, plain_weights = module(x, x, x)

    def work() -> bool:
        with torch.no_grad():
            output, weights = module(x, x, x)
        return torch.equal(output, plain) and torch.equal(weights, plain_weights)

    with beside(work, threads=2) as wrong:
        for _ in range(20):
            with regard.watch(module, regard.Entropy()), torch.no_grad():
                module(x, x, x)
            with regard.steer(module, regard.Gate(2.0)), torch.no_grad():
                module(x, x, x)
    assert not wrong


def test_a_name_imported_in_a_block_is_good_after_it() -> None:
    module, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 1, 8)
    arguments = (
        x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias,
    )  # fmt: skip
    plain = functional.multi_head_attention_forward(*arguments, training=False)
    with regard.watch(module, regard.Entropy()), torch.no_grad():
        from torch.nn.functional import multi_head_attention_forward as imported

        module(x, x, x)
    assert all(torch.equal(a, b) for a, b in zip(imported(*arguments, training=False), plain, strict=True))


@pytest.fixture
def llama() -> hf.PreTrainedModel:
    return cast(hf.PreTrainedModel, built("llama"))


PROMPT = torch.randint(5, 50, (1, 12), generator=torch.Generator().manual_seed(0))


def written(model: hf.PreTrainedModel, kept: list[Tensor]) -> None:
    kept.append(
        model.generate(
            PROMPT, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits
    )


@pytest.mark.parametrize("way", ["watch", "steer", "compress"])
def test_generate_in_a_thread_of_the_block(llama: hf.PreTrainedModel, way: str) -> None:
    """As a streamer has it."""
    contexts: dict[str, Callable[[], Any]] = {
        "watch": lambda: regard.watch(llama, regard.Entropy()),
        "steer": lambda: regard.steer(llama, regard.Block(keys=[2])),
        "compress": lambda: regard.compress(llama, regard.cache.Knorm(budget=6)),
    }
    there: list[Any] = []
    here: list[Any] = []
    with contexts[way]() as one:
        thread = threading.Thread(target=written, args=(llama, there))
        thread.start()
        thread.join()
    with contexts[way]() as other:
        written(llama, here)
    assert all(torch.equal(a, b) for a, b in zip(there[0], here[0], strict=True))
    if way == "watch":
        assert one.dataset().identical(other.dataset())
    if way == "compress":
        assert one.report().kept == other.report().kept < 1


def test_threads_that_were_there_before_are_left_alone(llama: hf.PreTrainedModel) -> None:
    plain: list[Any] = []
    during: list[Any] = []
    written(llama, plain)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with (
            torch.no_grad(),
            regard.steer(llama, regard.Block(keys=[2])),
            regard.watch(llama, regard.Entropy()) as seen,
        ):
            llama(PROMPT[:, :7])
            pool.submit(written, llama, during).result()
    assert all(torch.equal(a, b) for a, b in zip(plain[0], during[0], strict=True))
    assert seen.dataset().sizes["query"] == 7


def test_threads_of_others_are_left_alone(llama: hf.PreTrainedModel) -> None:
    """Also those that begin while a block is open elsewhere."""
    plain: list[Any] = []
    during: list[Any] = []
    written(llama, plain)
    go, done = threading.Event(), threading.Event()

    def server() -> None:
        go.wait(60)
        request = threading.Thread(target=written, args=(llama, during))
        request.start()
        request.join()
        done.set()

    threading.Thread(target=server).start()
    with torch.no_grad(), regard.steer(llama, regard.Block(keys=[2])):
        llama(PROMPT)
        go.set()
        assert done.wait(60)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], during[0], strict=True))


@pytest.mark.parametrize("in_thread", [False, True])
def test_tasks_do_not_see_each_other(llama: hf.PreTrainedModel, in_thread: bool) -> None:
    async def run(tokens: int) -> None:
        with torch.no_grad():
            if in_thread:
                await asyncio.to_thread(torch.no_grad()(llama), PROMPT[:, :tokens])
            else:
                llama(PROMPT[:, :tokens])

    async def watched(tokens: int, turns: int) -> int:
        with regard.watch(llama, regard.Entropy()) as seen:
            for _ in range(turns):
                await run(tokens)
                await asyncio.sleep(0)
        dataset = seen.dataset()
        assert dataset.sizes.get("pass", 1) == turns
        return int(dataset.sizes["query"])

    async def unwatched(turns: int) -> None:
        for _ in range(turns):
            await run(11)
            await asyncio.sleep(0)

    async def all_of_them() -> list[Any]:
        return list(await asyncio.gather(watched(5, 3), unwatched(5), watched(7, 4)))

    assert asyncio.run(all_of_them())[::2] == [5, 7]
