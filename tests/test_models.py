"""Models of one's own are loaded with their tokenizers, or it is said why not."""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from regard.models import complete, load


def test_a_folder_without_a_model(tmp_path: Path) -> None:
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
    assert complete(model, tokenizer, tokenizer("A word", return_tensors="pt"), 0) == ""
