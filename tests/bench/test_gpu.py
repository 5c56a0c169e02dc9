"""The checks that a GPU is held to hold on the processor, and each can fail."""

import math

import pytest
import torch
from bench.gpu import Check, checked, checks, difference, main
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


def test_it_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "There is no GPU" in capsys.readouterr().err
