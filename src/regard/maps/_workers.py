"""A process's workers, who share the parts of one computation among its cores, with one thread inside each part.

An operator that runs on several threads ends with a barrier, and beside another busy process each barrier waits for the
thread that had to share its core. Workers wait for each other once, at the end.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")


def each(function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Call ``function`` with every item, in as many threads at once as the caller's ``torch.get_num_threads()``.

    Inside a call torch has one thread, the caller's grad and inference mode, and no autocast. Items are begun in their
    order, so put the largest first; calls must not write to the same memory. The first error stops what was not yet
    begun, and is raised once what was begun has ended. With one thread, or one item, the caller does the work itself.
    """
    remaining = deque(items)
    threads = min(torch.get_num_threads(), len(remaining))
    if threads < 2:
        for item in remaining:
            function(item)
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                for item in _take(remaining):
                    function(item)
        finally:
            remaining.clear()

    futures: list[Future[None]] = []
    try:
        try:
            for _ in range(threads):
                futures.append(_workers.submit(work))
            futures[0].result()
        except RuntimeError:
            if len(futures) == threads:
                raise
            work()  # no thread can be started any more, as when the interpreter ends
    finally:  # nothing remains once one of them has ended, so those that still wait for a worker need not begin
        remaining.clear()
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()


def _take(remaining: deque[Item]) -> Iterator[Item]:
    """What remains, while others take from it too."""
    while remaining:
        try:
            item = remaining.popleft()
        except IndexError:  # another took the last one since
            return
        yield item


def _start() -> None:
    """Make the pool; a forked child has none of its parent's threads, and locks that they may have held."""
    global _workers, _counting
    _workers = ThreadPoolExecutor(os.cpu_count(), "regard-maps", initializer=_have_one_thread)
    _counting = threading.Lock()


def _have_one_thread() -> None:
    """Set this thread's number of threads.

    torch sets with it the number that later threads begin with, so a thread of no other use sets that back.
    """
    with _counting:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        setting_back = threading.Thread(target=torch.set_num_threads, args=(usual,))
        setting_back.start()
        setting_back.join()


_workers: ThreadPoolExecutor
_counting: threading.Lock
_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)
