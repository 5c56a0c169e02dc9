"""`regard explain`: a text, a target and a foil in; scores of tokens and their truth out."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import cli
from regard.explain import GenericRelevance, Rollout, faithfulness
from regard.explain.explain_text import every_explanation, explain_text, read_explanation

TEXT = "The code of Ada is 48213. It rained. The code of Tom is 70455. The code of Ada is"
runner = CliRunner()


def test_what_is_explained_is_the_metric_where_target_and_foil_part(mini: tuple[Any, Any]) -> None:
    model, tokenizer = mini
    methods = [GenericRelevance(), Rollout(residual=0.3)]
    found = explain_text(model, tokenizer, TEXT, methods, target=" 48213", foil=" 70455", steps=4)
    inputs = tokenizer(TEXT + " ", return_tensors="pt")
    metric = regard.logit_difference(*tokenizer.convert_tokens_to_ids(["4", "7"]))
    assert found.said == "logit of '4' less that of '7'"
    assert "".join(found.tokens) == "<s>" + TEXT + " "
    with torch.no_grad():
        assert found.plain == pytest.approx(float(metric(model(**inputs))), abs=1e-4)
    for name, method in (("GenericRelevance", methods[0]), ("Rollout(residual=0.3)", methods[1])):
        scores = method.explain(model, inputs, metric)
        torch.testing.assert_close(found.scores[name], scores[0], atol=1e-5, rtol=1e-4)
        truth = faithfulness(model, inputs, scores, metric, steps=4, keep=[0, -1])
        torch.testing.assert_close(found.truth[name].deletion, truth.deletion, atol=1e-3, rtol=1e-4)
    assert list(found.truth) == [*found.scores, "by chance"]
    assert found.truth["GenericRelevance"].insertion_area > found.truth["by chance"].insertion_area


def test_the_command_shows_text_tokens_and_truth() -> None:
    arguments = ["explain", "--prompt", TEXT, "--target", " 48213", "--foil", " 70455", "--steps", "2"]
    result = runner.invoke(cli.app, [*arguments, "--method", "rollout(residual=0.3)", "--method", "GenericRelevance"])
    assert result.exit_code == 0, result.output
    assert "logit of '4' less that of '7': " in result.output
    lines = result.output.splitlines()
    strongest = lines[lines.index("GenericRelevance") + 2]
    assert strongest.startswith("'4' ")
    assert "Rollout(residual=0.3)" in lines
    assert any(line.split()[:2] == ["by", "chance"] for line in lines)


def test_all_of_them_beside_one_another() -> None:
    arguments = ["explain", "--prompt", "Ada is 4821. Ada is", "--target", " 4", "--foil", " 7", "--steps", "1"]
    result = runner.invoke(cli.app, [*arguments, "--compare"])
    assert result.exit_code == 0, result.output
    assert all(repr(method).removesuffix("()") in result.output.splitlines() for method in every_explanation())


def test_read_as_one_writes_them() -> None:
    assert read_explanation("rollout(residual=0.3)") == Rollout(residual=0.3)
    with pytest.raises(ValueError, match=r"there is no explanation 'Rolout'; did you mean Rollout\?"):
        read_explanation("Rolout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", " 48213"], "the target ' 48213' is 6 tokens, and one is explained: give a foil"),
        (["--target", " 4", "--foil", " 4"], "one of the answers begins with the other; they must differ in a token"),
        (
            ["--target", " 4", "--foil", " 7", "--method", "Rolout"],
            "there is no explanation 'Rolout'; did you mean Rollout?",
        ),
        (["--target", " 4", "--foil", " 7", "--method", "Rollout", "--method", "rollout"], "must be some, each once"),
        (["--target", " 4", "--foil", " 7", "--method", "Rollout(residual=2)"], "residual must be from 0 to 1, got 2"),
        (["--target", ""], "changes how the end of the text is read as tokens"),
        (["--target", " 4", "--chat"], "the tokenizer has no chat template"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    result = runner.invoke(cli.app, ["explain", "--prompt", TEXT, *arguments])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
