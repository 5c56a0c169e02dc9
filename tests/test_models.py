"""Models of one's own are loaded with their tokenizers, or it is said why not."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf

from regard.models import Written, load, write
from tests.gguf_file import write_gguf


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load a model and its tokenizer from '{tmp_path}'"):
        load(tmp_path)


def test_weights_that_are_cut_off(tmp_path: Path, mini: tuple[Any, Any]) -> None:
    for part in mini:
        part.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"cannot load a model and its tokenizer from '{tmp_path}'"):
        load(tmp_path)


def test_of_a_translator_the_encoder(tmp_path: Path, minilm: tuple[Any, Any]) -> None:
    config = hf.T5Config(vocab_size=60, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    encoder, _ = load(tmp_path)
    assert [name for name, _ in encoder.named_children() if "decoder" in name] == []
    assert type(encoder).__name__ == "T5Stack"
    assert not encoder.training


def test_nothing_to_write(mini: tuple[Any, Any]) -> None:
    model, tokenizer = mini
    assert write(model, tokenizer, tokenizer("A word", return_tensors="pt"), 0) == Written([], [], "")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, mini: tuple[Any, Any]) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "mini.gguf"
    write_gguf(path, *mini)
    return path


@pytest.mark.parametrize("language", [True, False])
def test_a_gguf_file(gguf_file: Path, mini: tuple[Any, Any], language: bool) -> None:
    found, tokenizer = load(gguf_file, language=language)
    model, own = mini
    text = "The code of Ada is 48213. They slept."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = own(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model if language else model.model
        torch.testing.assert_close(found(ids)[0], plain(ids)[0], atol=1e-4, rtol=1e-4)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no file '{tmp_path}/model.gguf'"):
        load(tmp_path / "model.gguf")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="cannot load a model and its tokenizer from"):
        load(tmp_path / "model.gguf")


def test_a_gguf_file_without_what_reads_it(gguf_file: Path) -> None:
    with (
        patch("regard.models.find_spec", return_value=None),
        pytest.raises(ImportError, match=r'needs gguf and accelerate: pip install "regard\[gguf\]"'),
    ):
        load(gguf_file)
