"""The Triton kernel, under Triton's interpreter, or compiled where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.mixers.linear import _lightning_kernel
from tests.mixers.linear.lightning_kernel_cases import CASES

pytest.importorskip("triton", reason="of the dev extra, on Linux")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.mixers.linear.lightning_kernel_cases"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(CASES))
def test_outputs_states_and_gradients(name: str, errors: dict[str, dict[str, float]]) -> None:
    tolerance = 2e-2 if CASES[name][-1] == torch.bfloat16 else 1e-4
    wrong = {part: error for part, error in errors[name].items() if not error < tolerance}
    assert not wrong


def test_other_uses(errors: dict[str, dict[str, float]]) -> None:
    assert len(errors["other uses"]) == 7
    wrong = {use: error for use, error in errors["other uses"].items() if not error < 1e-4}
    assert not wrong


def test_what_it_does_not_take() -> None:
    q = torch.zeros(1, 2, 5, 4)
    assert not _lightning_kernel.fits(q, q, q, torch.zeros(2))  # not on a GPU
