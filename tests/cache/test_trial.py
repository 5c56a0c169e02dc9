"""`regard cache`: what is kept, the text shaded by it, and what is then said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module
from typer.testing import CliRunner

import regard
from regard import cli
from regard.cache import KeepAll, StreamingLLM
from regard.cache.trial import trial

TEXT = "The code of Ada is 48213. They slept. It rained all day. The code of Ada is"
runner = CliRunner()


def test_shares_tell_what_is_kept(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    found = trial(model, tokenizer, TEXT, StreamingLLM(budget=10, sinks=2), complete=6)
    tokens = len(tokenizer(TEXT)["input_ids"])
    assert "".join(found.tokens) == TEXT
    assert found.shares == [1.0] * 2 + [0.0] * (tokens - 10) + [1.0] * 8
    assert found.plain == " 48213"
    assert found.compressed != " 48213"
    assert trial(model, tokenizer, TEXT, KeepAll(), complete=6).compressed == " 48213"


def test_what_was_dropped_had_been_looked_at(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    found = trial(model, tokenizer, TEXT, StreamingLLM(budget=10, sinks=2), complete=6)
    ids = tokenizer(TEXT + found.shared, return_tensors="pt")["input_ids"]
    dropped = range(2, len(found.tokens) - 8)
    with torch.no_grad(), regard.watch(model, regard.Mass({"dropped": dropped})) as seen:
        model(ids)
    mass = seen.dataset().mass.sel(segment="dropped").isel(batch=0, query=-1)
    assert len(found.missed) == mass.size
    for layer, head, share in found.missed:
        assert share == pytest.approx(float(mass[layer, head]), abs=1e-5)
    assert [share for *_, share in found.missed] == sorted((share for *_, share in found.missed), reverse=True)
    assert found.missed[0][2] > 0.99


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT + "\n")
    arguments = ["--text", str(path), "--policy", "streaming_llm(sinks=2)", "--budget", "10", "--complete", "6"]
    result = runner.invoke(cli.app, ["cache", *arguments])
    assert result.exit_code == 0, result.output
    assert "StreamingLLM(budget=10, sinks=2): " in result.output
    assert "layer   3: 10 of" in result.output
    assert "full cache  48213" in result.output
    assert "compressed " in result.output
    assert "The·" in result.output
    assert "attention that went to what is dropped, where they part: layer " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "snpkv"], "there is no policy 'snpkv'; did you mean SnapKV?"),
        (["--policy", "BudgetPolicy"], "there is no policy 'BudgetPolicy'"),
        (["--policy", "SnapKV(windw=4)"], "SnapKV has no argument 'windw'; it takes budget"),
        (["--policy", "SnapKV(budget=3)", "--budget", "0.25"], "budget is given twice, as 0.25 and in"),
        (["--policy", "SnapKV(budget=3)"], "always keeps 32 entries, but the budget is 3"),
        (["--policy", "KeepAll", "--budget", "0.25"], "KeepAll has no argument 'budget'; it takes none"),
        (["--policy", "ImageRank"], "names no image token"),
        (["--policy", "SnapKV(Adptive(0.5))"], "there is no policy 'Adptive'; did you mean Adaptive?"),
        (["--policy", "SnapKV(when=16)"], "SnapKV: when must be such as AfterPrompt() or Every(16), got 16"),
        (["--policy", "7"], "expected a policy such as SnapKV(window=16)"),
        (["--budget", "2.5"], "above 0 and at most 1, got 2.5"),
        (["--budget", "much"], "a share such as 0.25, got 'much'"),
        (["--budget", "20"], "SnapKV: always keeps 32 entries, but the budget is 20"),
        (["--prompt", " "], "the text is empty"),
        (["--text", "missing.txt"], "there is no file missing.txt; the words of a text are given by --prompt"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    text = [] if {"--text", "--prompt"} & set(arguments) else ["--prompt", TEXT]
    result = runner.invoke(cli.app, ["cache", *arguments, *text])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_the_list_of_policies() -> None:
    """Each by its name, with what it keeps."""
    result = runner.invoke(cli.app, ["cache", "--policies"])
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert {"SnapKV", "ChunkKV", "QFilters", "KeepAll", "ExpectedAttention"} <= set(lines)
    assert lines["KeyDiff"] == "Keep the keys that are least like their mean: score_j = −cos(k_j, mean_i k_i / ‖k_i‖)."
    assert not {"Policy", "BudgetPolicy", "Around", "Budget", "When", "Rest"} & set(lines)


def test_slots_from_the_command_line() -> None:
    """Budget, time and rest, written as in Python."""
    written = "SnapKV(Adaptive(Pyramid(0.5)), window=4, when=Every(2), rest=Merge(seed=3))"
    result = runner.invoke(cli.app, ["cache", "--policy", written, "--prompt", TEXT, "--complete", "2"])
    assert result.exit_code == 0, result.output
    assert (
        "SnapKV(budget=Adaptive(Pyramid(0.5)), when=Every(2), rest=Merge(seed=3), window=4): "
        in result.output.replace("\n", "")
    )
    listed = runner.invoke(cli.app, ["cache", "--policies"]).stdout
    for slot in ("budget=", "when=", "rest="):
        assert f"\n{slot}\n" in listed
    assert {"Adaptive", "Pyramid", "ByLayer", "Every", "Drop", "Merge"} <= {
        line.split()[0] for line in listed.splitlines() if line
    }


def test_a_policy_around_another_from_the_command_line() -> None:
    result = runner.invoke(
        cli.app, ["cache", "--policy", "chunkkv(knorm, length=5)", "--budget", "30", "--prompt", TEXT]
    )
    assert result.exit_code == 0
    assert "ChunkKV(Knorm(budget=30), length=5): " in result.output
