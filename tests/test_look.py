"""The main job on real trained weights, and the command line on it."""

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import JambaConfig, JambaModel, Mamba2Config, Mamba2Model, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import regard
from regard import cli, demo
from regard.__main__ import main as command
from regard.look import look
from regard.models import load
from regard.view.heads import summarize
from regard.view.words import pieces
from regard.watch import save
from tests.inputs.models import bert, image, llava, t5, vit

runner = CliRunner()
DOCS = Path(__file__).parent.parent / "docs"
TEXT = demo.text()[:1500]


def test_statistics_of_trained_weights(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    seen = look(model, tokenizer, TEXT)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    data = seen.dataset.isel(batch=0)
    assert seen.facts.layers == 6
    assert seen.facts.heads == 12
    assert seen.facts.tokens == ids.shape[1] == data.sizes["query"]
    assert seen.facts.stored_memory == 6 * 12 * ids.shape[1] ** 2 * 4
    assert data.key_token[0] == "[CLS]"
    for layer, matrix in enumerate(matrices):
        matrix = matrix[0].double().numpy()
        entropy = -(matrix * np.log(np.maximum(matrix, 1e-300))).sum(-1)
        np.testing.assert_allclose(data.entropy[layer], entropy, atol=2e-5)
        np.testing.assert_allclose(data.received[layer], matrix.sum(1), rtol=1e-4)
        sink = matrix[..., 0] + matrix[..., -1]
        np.testing.assert_allclose(data.mass[layer].sel(segment="sink"), sink, atol=1e-5)
        previous = np.diagonal(matrix, -1, 1, 2)
        np.testing.assert_allclose(data["at"][layer].sel(target="previous")[:, 1:], previous, atol=1e-5)


def test_statistics_of_the_bundled_model(mini: tuple[Any, Any]) -> None:
    model, tokenizer = mini
    seen = look(model, tokenizer, demo.text())
    ids = torch.tensor([tokenizer(demo.text())["input_ids"]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    data = seen.dataset.isel(batch=0)
    assert data.key_token[0] == "<s>"
    for layer, matrix in enumerate(matrices):
        matrix = matrix[0].double().numpy()
        np.testing.assert_allclose(data.received[layer], matrix.sum(1), rtol=1e-4)
        np.testing.assert_allclose(data.mass[layer].sel(segment="sink"), matrix[..., 0], atol=1e-5)
    assert {"previous-token", "sink"} <= set(summarize(seen.dataset)["kind"].values.ravel())


@pytest.mark.parametrize(("text", "kind"), [("twice", "induction"), ("facts", "retrieval")])
def test_what_the_bundled_model_was_trained_for_shows(mini: tuple[Any, Any], text: str, kind: str) -> None:
    read = (DOCS / f"{text}.txt").read_text()
    assert kind in summarize(look(*mini, read).dataset)["kind"].values


@pytest.mark.parametrize("text", ["你好，世界。\n今天天气很好", "Antidisestablishmentarianism", "It rained.\n"])
def test_the_report_has_the_text_as_it_was_written(mini: tuple[Any, Any], tmp_path: Path, text: str) -> None:
    seen = look(*mini, text)
    assert "".join(pieces(seen.dataset, 0)).removeprefix("<s>") == text
    save(seen.dataset, tmp_path / "seen.nc")
    assert pieces(regard.load(tmp_path / "seen.nc"), 0) == pieces(seen.dataset, 0)


def test_windows_cover_the_whole_text(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    text = " ".join([demo.text()] * 2)
    seen = look(model, tokenizer, text, window=True)
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = [token for row in seen.dataset.key_token.values for token in row if token not in ("", "[CLS]", "[SEP]")]
    assert tokens == tokenizer.convert_ids_to_tokens(plain)
    assert seen.dataset.sizes["batch"] == -(-len(plain) // 510)
    assert seen.dataset.sizes["query"] == 512


def test_a_causal_model_of_ones_own(tmp_path: Path, minilm: tuple[Any, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = minilm
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=len(tokenizer), max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text(demo.text())
    out, saved = tmp_path / "out.html", tmp_path / "seen.nc"
    arguments = ["--model", str(tmp_path / "llama"), "--text", str(text), "--out", str(out), "--save", str(saved)]
    result = runner.invoke(
        cli.app, ["look", *arguments, "--layers", "*.1.*", "--dtype", "bfloat16", "--max-tokens", "50"]
    )
    assert result.exit_code == 0, result.output
    data = regard.load(saved)
    assert data.layer.values.tolist() == ["layers.1.self_attn"]
    assert data.sizes["query"] == 50
    assert not data["at"].sel(target="next").fillna(0).any()
    page = out.read_text()
    assert "layers.1.self_attn" in page
    assert "http-equiv" in page


def test_default_report(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = runner.invoke(cli.app, ["look", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.as_uri() in result.output
    page = out.read_text()
    assert regard.mini.name in page
    assert demo.TEXT_NAME in page
    assert "<script src" not in page


def test_text_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Call me Ishmael."))
    out = tmp_path / "report.html"
    result = runner.invoke(cli.app, ["look", "--text", "-", "--out", str(out)], input="Call me Ishmael.")
    assert result.exit_code == 0, result.output
    assert "standard input" in out.read_text()


def test_layers_and_tokens_on_the_command_line(tmp_path: Path) -> None:
    saved = tmp_path / "seen.nc"
    arguments = ["--prompt", "It rained all day.", "--layers", "1-2, *.0.*", "--max-tokens", "3", "--save", str(saved)]
    result = runner.invoke(cli.app, ["look", *arguments, "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 0, result.output
    data = regard.load(saved)
    assert data.layer.values.tolist() == [f"layers.{layer}.self_attn" for layer in (0, 1, 2)]
    assert data.key_token[0].values.tolist() == ["<s>", "It", "Ġr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "long.txt"], "the model has positions for 1,024; pass --window"),
        (["--text", "missing.txt"], "there is no file missing.txt; the words of a text are given by --prompt"),
        (["--text", "empty.txt"], "the text is empty"),
        (["--layers", "decoder.*"], "'decoder.*' matches no attention call; seen were layers.0.self_attn"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--model", "./nothing"], "there is no folder './nothing'"),
        (["--model", "./[/b]"], "there is no folder './[/b]'"),
        (["--layers", "abc[/]def"], "'abc[/]def' matches no attention call"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' for PyTorch"),
        (["--device", "gpu"], "there is no device 'gpu' for PyTorch"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("word " * 1200)
    Path("empty.txt").write_text(" \n")
    result = runner.invoke(cli.app, ["look", *arguments])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not Path("report.html").exists()


def test_errors_quote_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(cli.app, ["mixers", "[/x]"])
    assert result.exit_code == 1
    assert "[/x]" in result.output
    monkeypatch.setattr("regard.models.load", Mock(side_effect=ImportError('pip install "regard[report]"')))
    assert 'error: pip install "regard[report]"' in runner.invoke(cli.app, ["look"]).output


def test_the_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"regard {regard.__version__}\n"


def test_the_report_is_opened_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", opened.append)
    arguments = ["look", "--prompt", "It rained.", "--out", str(tmp_path / "report.html")]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert opened == []
    assert runner.invoke(cli.app, [*arguments, "--open"]).exit_code == 0
    assert opened == [(tmp_path / "report.html").as_uri()]


def test_an_interrupt_ends_the_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.cli.app", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="interrupted") as found:
        command()
    assert found.value.__suppress_context__


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read more than text, each in a folder with what prepares its inputs, and a picture."""
    folder = tmp_path_factory.mktemp("models")
    for build in (vit, t5, bert, llava):
        for part in build():
            part.save_pretrained(folder / build.__name__)
    image().save(folder / "noise.png")
    return folder


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("vit", ["--image", "noise.png"], ["17 tokens, 2 layers of 4 heads"]),
        ("t5", ["--prompt", "it rained", "--target", "he slept"], ["8 tokens, 6 layers of 4 heads"]),
        ("t5", ["--prompt", "it rained"], ["no --target was given: the decoder reads what the model itself writes"]),
        ("bert", ["--prompt", "it rained", "--pair", "he slept"], ["7 tokens, 2 layers of 4 heads"]),
        ("llava", ["--prompt", "what is it ?", "--image", "noise.png"], ["the image stands before the prompt"]),
    ],
)
def test_more_than_text_on_the_command_line(
    model: str, arguments: list[str], said: list[str], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    out = tmp_path / "report.html"
    result = runner.invoke(cli.app, ["look", "--model", f"./{model}", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    for line in said:
        assert line in result.output
    page = out.read_text()
    assert ('"source":"data:image/png;base64,' in page) == ("--image" in arguments)
    assert ("Cross-attention" in page) == (model == "t5")


@pytest.mark.parametrize(
    ("command", "model", "arguments", "message"),
    [
        ("look", "vit", [], "ViTModel reads images alone: give --image"),
        ("look", "bert", ["--image", "noise.png"], "BertModel reads texts: leave out --image"),
        ("look", "bert", ["--prompt", "it", "--image", "noise.png"], "BertModel reads texts: leave out --image"),
        ("look", "bert", ["--prompt", "it", "--target", "he"], "BertModel reads texts: leave out --target"),
        ("steer", "bert", ["--prompt", "it", "--edit", "Gate(0)"], "bert reads both ways and fills in words"),
        ("steer", "t5", ["--prompt", "it", "--edit", "Gate(0)"], "t5 makes one text of another: a causal"),
        ("sweep", "vit", ["--prompt", "it"], "vit has no head that goes on with a text: a causal language model"),
        ("cache", "llava", ["--prompt", "it"], "llava has no head that goes on with a text: a causal language model"),
    ],
)
def test_what_a_model_is_not_made_for_is_one_line(
    command: str, model: str, arguments: list[str], message: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    result = runner.invoke(cli.app, [command, "--model", f"./{model}", *arguments])
    assert result.exit_code == 1
    errors = result.output.strip().partition("error: ")[2]
    assert errors.startswith(message)
    assert len(errors.splitlines()) == 1
    assert not Path("report.html").exists()


def test_a_model_without_attention_is_looked_at(tmp_path: Path, mini: tuple[Any, Any]) -> None:
    tokenizer = mini[1]
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=len(tokenizer), state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen = look(*load(tmp_path), TEXT[:100])
    assert seen.dataset.layer.values.tolist() == ["layers.0.mixer.mixer", "layers.1.mixer.mixer"]
    np.testing.assert_allclose(seen.dataset.received.sum("key"), seen.facts.tokens, rtol=1e-4)
    assert "layers without attention, 2 of them" in seen.notes[0]
    assert seen.notes[0] in seen.html()


def test_layers_that_cannot_be_seen_are_told(mini: tuple[Any, Any]) -> None:
    tokenizer = mini[1]
    config = JambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1,
    )  # fmt: skip
    seen = look(JambaModel(config).eval(), tokenizer, TEXT[:100])
    assert seen.dataset.sizes["layer"] == 1
    assert seen.notes[0].startswith("not shown: 1 of 2 layers, which have no attention")


def test_a_model_whose_layers_are_all_unknown_is_refused(mini: tuple[Any, Any]) -> None:
    config = Mamba2Config(
        vocab_size=len(mini[1]), hidden_size=32, num_hidden_layers=1, state_size=4, num_heads=8, head_dim=8, n_groups=1
    )
    with pytest.raises(
        RuntimeError, match="Mamba2Model has none, but Mamba2Block; of such layers those of Mamba, Qwen3"
    ):
        look(Mamba2Model(config).eval(), mini[1], TEXT[:100])
