"""Threads that enter and leave blocks beside threads that only call: each sees its own, and the others nothing.

python -m fuzz.threads [--minutes 5] [--seed SEED]
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import regard
from fuzz.cases import agree
from fuzz.drawing import main


def tensors(draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Of one thread's own size, so that another's call is known when it is seen."""
    generator = torch.Generator().manual_seed(draw.getrandbits(40))
    query, key, value = torch.randn(3, 1, 2, draw.randint(4, 60), 8, generator=generator).unbind()
    return query, key, value


def bystander(draw: random.Random, stop: threading.Event) -> None:
    """Calls that nobody watches or steers stay what they are, bit for bit."""
    q, k, v = tensors(draw)
    plain = scaled_dot_product_attention(q, k, v)
    while not stop.is_set():
        if not torch.equal(scaled_dot_product_attention(q, k, v), plain):
            raise AssertionError("a call of a thread without a block was changed by another thread's block")


def watcher(draw: random.Random, stop: threading.Event) -> None:
    """A block sees the calls of its own thread, and no others."""
    q, k, v = tensors(draw)
    expected = (q.double() @ k.double().mT / 8**0.5).softmax(-1).sum(2)
    while not stop.is_set():
        calls = draw.randint(1, 3)
        with regard.watch(regard.Received()) as seen:
            for _ in range(calls):
                scaled_dot_product_attention(q, k, v)
                time.sleep(draw.random() / 1000)
        data = seen.dataset()
        if data.sizes["layer"] != calls and data.sizes.get("key") != k.shape[2]:
            raise AssertionError(f"{calls} calls were made, and {dict(data.sizes)} recorded")
        total = torch.tensor(data.received.values).reshape(-1, *expected.shape)
        agree(total.sum(0) / max(1, round(float(total.sum() / expected.sum()))), expected, 1e-4, "received")


def editor(draw: random.Random, stop: threading.Event) -> None:
    """A block changes the calls of its own thread."""
    q, k, v = tensors(draw)
    gate = draw.uniform(-2, 2)
    plain = scaled_dot_product_attention(q, k, v)
    while not stop.is_set():
        with regard.steer(None, regard.Gate(gate)):
            time.sleep(draw.random() / 1000)
            agree(scaled_dot_product_attention(q, k, v), gate * plain, 1e-5, "steered output")
        agree(scaled_dot_product_attention(q, k, v), plain, 1e-6, "output after the block")


def together(draw: random.Random) -> str:
    """Some of each, for a fraction of a second; what is left behind is nothing."""
    before = torch.nn.functional.scaled_dot_product_attention
    stop, kinds = threading.Event(), (bystander, watcher, editor)
    chosen: list[Callable[[random.Random, threading.Event], None]] = [
        draw.choice(kinds) for _ in range(draw.randint(2, 6))
    ]
    with ThreadPoolExecutor(len(chosen)) as pool:
        running = [pool.submit(kind, random.Random(draw.getrandbits(40)), stop) for kind in chosen]
        time.sleep(draw.uniform(0.05, 0.4))
        stop.set()
        for thread in running:
            thread.result(timeout=60)
    if torch.nn.functional.scaled_dot_product_attention is not before:
        raise AssertionError("after all blocks were left, the function is not what it was")
    return ", ".join(kind.__name__ for kind in chosen)


CHECKS = {"together": together}

if __name__ == "__main__":
    main("fuzz.threads", __doc__, CHECKS)
