"""Which heads matter for an answer, on the bundled model and from the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module
from typer.testing import CliRunner

import regard
from regard import cli
from regard.steer.sweep_text import sweep_text

TEXT = "The code of Ada is 48213. The code of Tom is 70455. They slept. The code of Ada is"
OTHER = "The code of Ada is 70455. The code of Tom is 48213. They slept. The code of Ada is"
runner = CliRunner()


def log_chances(mini: tuple[Module, Any], text: str) -> tuple[torch.Tensor, list[int]]:
    """Of each token of a text but its first, and the tokens."""
    model, tokenizer = mini
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chances = model(ids).logits[0, :-1].log_softmax(-1)
    return chances.gather(1, ids[0, 1:, None])[:, 0], ids[0].tolist()


def test_probability_of_an_answer_of_several_tokens(mini: tuple[Module, Any]) -> None:
    found = sweep_text(*mini, TEXT, answer=" 48213", layers=2, heads=[2])
    chances, ids = log_chances(mini, TEXT + " 48213")
    answer = chances[-6:]  # a space and five digits
    assert mini[1].decode(ids[-6:]) == " 48213"
    assert found.plain == pytest.approx(float(answer.sum()), abs=1e-4)
    with regard.steer(mini[0], regard.Gate(0, layers=2, heads=2)):
        chances, _ = log_chances(mini, TEXT + " 48213")
    assert float(found.dataset.metric.squeeze()) == pytest.approx(float(chances[-6:].sum()), abs=1e-4)


def test_answers_are_compared_where_they_differ(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    found = sweep_text(*mini, TEXT, answer=" 48213", wrong=" 48999", layers=3)
    assert found.dataset.attrs["metric"] == "logit of '2' less that of '9'"
    with torch.no_grad():
        logits = model(**tokenizer(TEXT + " 48", return_tensors="pt")).logits[0, -1]
    two, nine = tokenizer.convert_tokens_to_ids(["2", "9"])
    assert found.plain == pytest.approx(float(logits[two] - logits[nine]), abs=1e-4)


def test_likelihood_of_the_text_itself(mini: tuple[Module, Any]) -> None:
    found = sweep_text(*mini, TEXT, layers=3, max_tokens=20)
    chances, _ = log_chances(mini, TEXT)
    assert found.plain == pytest.approx(float(chances[:19].mean()), abs=1e-5)


def test_a_head_patched_from_a_counterfactual_prompt(mini: tuple[Module, Any]) -> None:
    model, tokenizer = mini
    found = sweep_text(*mini, TEXT, answer=" 48213", wrong=" 70455", kind="patch", source=OTHER)
    inputs, source = (tokenizer(text + " ", return_tensors="pt") for text in (TEXT, OTHER))
    right, wrong = tokenizer.convert_tokens_to_ids(["4", "7"])
    again = regard.sweep(model, inputs, regard.logit_difference(right, wrong), kind="patch", source=source)
    assert found.dataset.metric.values == pytest.approx(again.dataset.metric.values, abs=1e-4)
    assert found.strongest(1)[0].change < -5


def test_command_line(tmp_path: Path) -> None:
    out, saved, text = tmp_path / "sweep.html", tmp_path / "sweep.nc", tmp_path / "text.txt"
    text.write_text(TEXT + "\n")
    arguments = ["--text", str(text), "--answer", " 48213", "--wrong", " 70455", "--layers", "2-3"]
    files = ["--out", str(out), "--save", str(saved)]
    result = runner.invoke(cli.app, ["sweep", *arguments, *files, "--strongest", "3"])
    assert result.exit_code == 0, result.output
    found = regard.SweepResult(regard.load(saved))
    assert found.dataset.layer.values.tolist() == [f"model.layers.{layer}.self_attn" for layer in (2, 3)]
    listed = re.findall(r"(\S+self_attn) +(\d) +(\S+) +([+-]\S+)", result.output)
    assert [(layer, int(head), change) for layer, head, _, change in listed] == [
        (one.layer, one.head, f"{one.change:+.4g}") for one in found.strongest(3)
    ]
    row = next(line for line in result.output.splitlines() if line.endswith("model.layers.2.self_attn"))
    most = float(abs(found.change).max())
    shown = [(len(cell), cell[0]) for cell in row.split()[:-1]]
    wanted = [
        (2 if abs(change) >= most / 2 else 1, "·" if abs(change) < most / 10 else "−" if change < 0 else "+")
        for change in found.change.values[0]
    ]
    assert shown == wanted
    assert out.as_uri() in result.output
    page = out.read_text()
    assert "logit of &#39;4&#39; less that of &#39;7&#39;" in page
    assert "text.txt" in page
    assert "http-equiv" in page
    assert "<script src" not in page
    data = json.loads(re.findall(r'id="page">(.*?)</script>', page)[0])
    assert len(re.findall(r"<tr><td>model", page)) == 16
    assert data["layout"]["yaxis"]["ticktext"] == ["2", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "none"], "kind must be one of zero, mean, resample, gate, patch, got 'none'"),
        (["--kind", "gate"], 'by is the finite factor of kind="gate"'),
        (["--kind", "patch"], "patch needs a source"),
        (["--kind", "patch", "--source", "It rained."], "tokens on the inputs, but 5 on the source"),
        (["--wrong", " 70455"], "give --answer too"),
        (["--answer", " 48213", "--wrong", " 482"], "one of the answers begins with the other"),
        (["--answer", ""], "changes how the end of the text is read as tokens"),
        (["--prompt", "I", "--answer", "t"], "begin the answer with the space"),
        (["--answer", " 4", "--max-tokens", "9"], "--max-tokens may cut off"),
        (["--layers", "decoder.*"], "'decoder.*' matches no attention call"),
        (["--prompt", "word " * 1100], "but the model has positions for 1,024"),
        (["--prompt", "word " * 1021, "--answer", " 48213"], "text and answer have 1,02"),
        (["--text", "missing.txt"], "there is no file missing.txt"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = [] if {"--text", "--prompt"} & set(arguments) else ["--prompt", TEXT]
    result = runner.invoke(cli.app, ["sweep", *arguments, *text])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not Path("sweep.html").exists()
