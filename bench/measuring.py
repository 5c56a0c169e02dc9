"""Time side by side, every variant in every round, as the median of the rounds' ratios; and peaks of memory."""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

Run = Callable[[], object]


def clock(run: Run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(runs: dict[str, Run], device: str, repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of the first, and the median over rounds of each one's ratio to it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(clock(run, device))
    base = next(iter(times.values()))
    ratios = {name: statistics.median(t / b for t, b in zip(of, base, strict=True)) for name, of in times.items()}
    return statistics.median(base), ratios


def in_fresh_process(function: Callable[..., float], *arguments: object) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak() -> float:
    """The most memory that this process has held, in bytes; getrusage would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * float(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def allocated(prepare: Callable[[], Run]) -> int:
    """Bytes of tensors held at the peak of the run that ``prepare`` returns, those that were made to prepare it included."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run = prepare()
        with torch.profiler.record_function("the run"):
            run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, peaks = 0, [0]
    for event in events:
        if event.name() == "the run":
            peaks = [held]
        elif event.name() == "[memory]":
            held += event.nbytes()
            peaks.append(held)
    return max(peaks)


def extra_memory(run: Run, device: str) -> float:
    """Bytes by which a run raises the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    highest = peak()
    run()
    return peak() - highest
