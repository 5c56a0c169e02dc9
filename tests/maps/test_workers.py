"""Workers do every item, in the caller's modes, and leave the process's number of threads as it was."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from regard.maps._workers import each


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_every_item_once_and_on_other_threads() -> None:
    done: list[int] = []
    threads = set()

    def function(item: int) -> None:
        threads.add(threading.get_ident())
        done.append(item)

    each(function, range(100))
    assert sorted(done) == list(range(100))
    assert threading.get_ident() not in threads


def test_one_thread_or_one_item_is_the_callers_own_work() -> None:
    threads = []
    each(lambda _: threads.append(threading.get_ident()), [0])
    torch.set_num_threads(1)
    each(lambda _: threads.append(threading.get_ident()), range(3))
    assert set(threads) == {threading.get_ident()}


def test_number_of_threads_is_one_inside_and_untouched_outside() -> None:
    barrier = threading.Barrier(2, timeout=30)  # so that both workers take part
    inside = []

    def function(_: int) -> None:
        barrier.wait()
        inside.append(torch.get_num_threads())

    each(function, range(2))
    assert inside == [1, 1]
    assert torch.get_num_threads() == 2
    assert in_new_thread(torch.get_num_threads) == 2


def test_callers_modes() -> None:
    inside: list[tuple[bool, bool, bool]] = []

    def function(_: int) -> None:
        inside.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.no_grad(), torch.autocast("cpu"):
        each(function, range(4))
    assert set(inside) == {(False, False, False)}
    inside.clear()
    with torch.inference_mode():
        total = torch.zeros(4)
        each(lambda i: total[i].add_(i), range(4))
        each(function, range(4))
    assert total.tolist() == [0, 1, 2, 3]
    assert set(inside) == {(False, True, False)}
    inside.clear()
    each(function, range(4))
    assert set(inside) == {(True, False, False)}


@pytest.mark.parametrize("error", [ValueError, IndexError, RuntimeError, KeyboardInterrupt])
def test_error_is_raised_after_what_was_begun_and_stops_the_rest(error: type[BaseException]) -> None:
    running, ended = [], []

    def function(item: int) -> None:
        running.append(item)
        if item == 1:
            raise error("item 1")
        time.sleep(0.01)
        ended.append(item)

    with pytest.raises(error, match="item 1"):
        each(function, range(1000))
    assert len(running) < 1000
    assert len(ended) == len(running) - 1
    each(ended.append, range(-1, 1))  # the workers live on
    assert ended[-2:] == [-1, 0]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signals to threads")
def test_interrupt_of_the_caller_waits_for_what_was_begun() -> None:
    running, ended = [], []

    def function(item: int) -> None:
        running.append(item)
        if item == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        ended.append(item)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            each(function, range(1000))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == len(running) < 1000


def test_from_several_threads_at_once_and_from_inside() -> None:
    sums = [torch.zeros(50) for _ in range(8)]

    def caller(total: torch.Tensor) -> None:
        torch.set_num_threads(2)
        each(lambda i: each(lambda j: total[i].add_(j), range(4)), range(50))

    threads = [threading.Thread(target=caller, args=(total,)) for total in sums]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(total, torch.full((50,), 6.0)) for total in sums)


def _in_child(results: "multiprocessing.Queue[list[int]]") -> None:
    done: list[int] = []
    each(done.append, range(10))
    results.put(done)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_after_fork() -> None:
    each(lambda _: None, range(10))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(results,))
    child.start()
    assert sorted(results.get(timeout=60)) == list(range(10))
    child.join()
    assert child.exitcode == 0
