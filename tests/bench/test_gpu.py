"""The checks that a GPU is held to hold on the processor, and each can fail."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.gpu import Check, checked, checks, difference
from bench.results import Report

CHECKS = {check.name: check for check in checks("cpu")}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_hold_on_the_processor(name: str) -> None:
    check = CHECKS[name]
    wrong = {part: error for part, error in check.errors().items() if not error <= check.tolerance}
    assert not wrong


def test_differences() -> None:
    assert difference(torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf])) == 0
    assert difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert difference(torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 2.0])) == math.inf
    assert difference(torch.tensor([0.0, 2.0]), torch.tensor([-math.inf, 2.0])) == math.inf


def test_what_is_wrong_or_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no such kernel\nand more")

    made = [Check("right", 1.0, lambda: {"all": 0.5}), Check("wrong", 1.0, lambda: {"a": 0.5, "b": math.inf})]
    monkeypatch.setattr("bench.gpu.checks", lambda device: iter([*made, Check("broken", 1.0, broken)]))
    report = Report("gpu", save=False)
    assert checked(report, "cpu") == ["wrong", "broken"]
    assert "RuntimeError: no such kernel" in report.cells.values()
    named = f"against float64, cpu: {'right'}, largest error"
    assert report.cells[named] == "5.0e-01, all"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says where there is none")
def test_it_says_that_there_is_no_gpu() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "There is no GPU" in run.stderr
