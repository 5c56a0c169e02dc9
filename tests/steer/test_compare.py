"""Before and after, on the bundled model and from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.nn import Module
from typer.testing import CliRunner

import regard
from regard import cli
from regard.steer.compare import compare

TEXT = "The code of Ada is 48213. The code of Tom is 70455. The code of Ada is"
runner = CliRunner()


def test_what_is_hidden_is_not_said(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    found = compare(model, tokenizer, TEXT, [regard.Block(keys=" 48213")], complete=6)
    assert found.plain.completion == " 48213"
    assert found.steered.completion != " 48213"
    assert list(found.plain.probabilities) == list(found.steered.probabilities)
    assert len(found.plain.probabilities) >= 5
    again = compare(model, tokenizer, TEXT, [regard.Gate(1.0)])
    assert again.steered.probabilities == pytest.approx(again.plain.probabilities, abs=1e-5)
    assert again.plain.completion == ""


def test_command_line_shows_both(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    regard.save_recipe(recipe, [regard.Block(keys=" 48213")])
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "\n")
    arguments = ["--text", str(text), "--recipe", str(recipe), "--edit", "Gate(by=0.9, layers=[0])", "--complete", "6"]
    result = runner.invoke(cli.app, ["steer", *arguments])
    assert result.exit_code == 0, result.output
    assert "Block(keys=" in result.output
    assert "Gate(by=0.9, layers=[0])" in result.output
    assert "plain  48213" in result.output
    assert "steered" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give an --edit, or a --recipe"),
        (["--edit", "Reweight(keys='Ada', by=2)"], "the passage 'Ada' occurs 2 times"),
        (["--edit", "Reweight(keys='Eve', by=2)"], "the passage 'Eve' does not occur"),
        (["--edit", "Reweight(keys=[900], by=2)"], "keys names position 900, but"),
        (["--edit", "Reweight(keys=0, by=2, layers='*.9.*')"], "'*.9.*' matches no attention call"),
        (["--edit", "Reweight(keys=0, by=-1)"], "at least 0, got -1"),
        (["--edit", "Rewait(keys=0, by=1)"], "did you mean Reweight?"),
        (["--edit", "Mutual(source=3)"], "needs source to be a run that regard.capture kept, in Python, got int"),
        (["--edit", "PatchOutput(source='x')"], "needs source to be a run that regard.capture kept"),
        (["--recipe", "missing.json"], "missing.json"),
        (
            ["--edit", "Gate(1)", "--text", "missing.txt"],
            "there is no file missing.txt; the words of a text are given by",
        ),
        (["--edit", "Gate(1)", "--text", "The code of Ada"], "there is no file The code of Ada"),
        (["--edit", "Gate(1)", "--text", "."], ". is a folder"),
        (["--edit", "Gate(1)", "--prompt", "Ada", "--text", "ada.txt"], "given twice, by --text and by --prompt"),
        (["--edit", "Gate(1)", "--prompt", "word " * 1100], "but the model has positions for 1,024"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    text = [] if {"--text", "--prompt"} & set(arguments) else ["--prompt", TEXT]
    result = runner.invoke(cli.app, ["steer", *arguments, *text])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_command_line_says_where_completions_part() -> None:
    """The next token may be as it was, and only later ones differ."""
    text = "The code of Ada is 48213. It rained all day. The code of Tom is 70455. They slept. The code of Ada is"
    edit = 'Redistribute(source="48213", target="70455")'
    result = runner.invoke(cli.app, ["steer", "--prompt", text, "--edit", edit, "--complete", "6"])
    assert "plain  48213" in result.output
    assert "steered  70455" in result.output
    assert "after ' ', where the completions part:" in result.output
    table = {row.split()[0]: row.split()[1:] for row in result.output.splitlines() if row.strip().startswith("'")}
    assert [float(share.rstrip("%")) > 90 for share in (*table["'4'"], *table["'7'"])] == [True, False, False, True]
    assert "model.layers.3.self_attn head 5" in result.output


def test_recipes_are_json(tmp_path: Path) -> None:
    regard.save_recipe(tmp_path / "recipe.json", [regard.Reweight(keys=slice(1, 5), by=2.0, heads=[3])])
    assert json.loads((tmp_path / "recipe.json").read_text()) == [
        {"edit": "Reweight", "keys": {"slice": [1, 5, None]}, "by": 2.0, "heads": [3]}
    ]
