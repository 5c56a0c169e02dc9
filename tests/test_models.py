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


T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
BART = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("kind", [hf.BartForConditionalGeneration, hf.BartModel])
def test_of_a_translator_what_writes_where_its_head_is_there(
    kind: Any, tmp_path: Path, minilm: tuple[Any, Any]
) -> None:
    kind(hf.BartConfig(**BART, tie_word_embeddings=False)).save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.BertConfig(**SMALL, vocab_size=60), "bert reads both ways and fills in words: a causal language model"),
        (hf.T5Config(**T5), "t5 makes one text of another: a causal language model is needed here, such as GPT-2"),
        (hf.ViTConfig(**SMALL, image_size=16, patch_size=8), "vit has no head that goes on with a text"),
    ],
)
def test_what_does_not_go_on_with_a_text_is_no_language_model(config: Any, message: str, tmp_path: Path) -> None:
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, language=True)
    assert len(str(raised.value).splitlines()) == 1


def test_a_head_without_weights_writes_nothing(tmp_path: Path, mini: tuple[Any, Any]) -> None:
    config = hf.LlamaConfig(**SMALL, vocab_size=len(mini[1]), tie_word_embeddings=False)
    hf.LlamaModel(config).save_pretrained(tmp_path)
    mini[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for lm_head.weight: llama would write at random"):
        load(tmp_path, language=True)


def test_an_encoder_that_was_made_a_decoder_goes_on(tmp_path: Path, minilm: tuple[Any, Any]) -> None:
    hf.BertLMHeadModel(hf.BertConfig(**SMALL, vocab_size=60, is_decoder=True)).save_pretrained(tmp_path)
    minilm[1].save_pretrained(tmp_path)
    assert type(load(tmp_path, language=True)[0]).__name__ == "BertLMHeadModel"


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
