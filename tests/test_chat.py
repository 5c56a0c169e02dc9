"""A message to a chat model: every command and function reads it in the tokenizer's template, once."""

import copy
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import cli
from regard.cache import KeepAll
from regard.cache.trial import trial
from regard.models import write
from regard.steer.compare import compare
from regard.steer.sweep_text import sweep_text
from regard.tokens import chat_text, encode

MESSAGE = "The code of Ada is 48213. The code of Tom is 70455. The code of Ada is"
TEMPLATE = "{% for m in messages %}<s>It rained. {{ m.content }}{% endfor %}"
READ = f"<s>It rained. {MESSAGE}"
runner = CliRunner()


@pytest.fixture
def chatting(mini: tuple[Any, Any]) -> tuple[Any, Any]:
    """The bundled model, with a template that says something before the message."""
    model, tokenizer = mini
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def test_the_template_stands_around_the_message(chatting: tuple[Any, Any]) -> None:
    model, tokenizer = chatting
    assert chat_text(tokenizer, MESSAGE) == READ
    (encoded,) = encode(model, tokenizer, READ, add_special_tokens=False)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": MESSAGE}], return_dict=True)["input_ids"]
    assert encoded.inputs["input_ids"][0].tolist() == ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_comparison(chatting: tuple[Any, Any]) -> None:
    model, tokenizer = chatting
    found = compare(model, tokenizer, MESSAGE, [regard.Block(keys=" 48213")], complete=6, chat=True, heads=0)
    inputs = tokenizer(READ, add_special_tokens=False, return_tensors="pt")
    (edit,) = found.edits
    assert tokenizer.decode(inputs["input_ids"][0, edit.given()["keys"]]) == " 48213"
    assert found.plain.completion == write(model, tokenizer, inputs, 6).text == " 48213"
    with regard.steer(model, edit):
        assert found.steered.completion == write(model, tokenizer, inputs, 6).text


def test_a_compressed_cache(chatting: tuple[Any, Any]) -> None:
    found = trial(*chatting, MESSAGE, KeepAll(), complete=6, chat=True)
    assert "".join(found.tokens) == READ
    assert (found.plain, found.compressed, found.missed) == (" 48213", " 48213", ())


def test_a_sweep(chatting: tuple[Any, Any]) -> None:
    model, tokenizer = chatting
    found = sweep_text(model, tokenizer, MESSAGE, answer=" 4", layers=[3], heads=[0], chat=True)
    ids = tokenizer(READ, add_special_tokens=False)["input_ids"]
    answer = tokenizer(" 4", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain = regard.log_probability(answer)(model(torch.tensor([[*ids, *answer[:-1]]])))
    assert found.plain == pytest.approx(float(plain), abs=1e-5)


@pytest.mark.parametrize("command", [["steer", "--edit", "Gate(0.5)"], ["cache"], ["sweep"]])
def test_a_model_that_does_not_chat(command: list[str]) -> None:
    result = runner.invoke(cli.app, [*command, "--prompt", MESSAGE, "--chat"])
    assert result.exit_code == 1
    assert "the tokenizer has no chat template: leave out --chat" in result.output.replace("\n", " ")


def test_nothing_to_say(chatting: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="the text is empty"):
        chat_text(chatting[1], " ")
