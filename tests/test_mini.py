"""The bundled model: whole, loadable, and doing with its attention what it was trained to do."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard import demo
from regard.mini._mini import check

Loaded = tuple[Any, Any]


def test_is_an_ordinary_small_llama(mini: Loaded) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model, tokenizer = mini
    again = AutoModelForCausalLM.from_pretrained(regard.mini.path(), dtype=torch.float32)
    assert isinstance(again, LlamaForCausalLM)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(weight.numel() for weight in model.parameters()) <= 8_000_000
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())
    assert tokenizer.is_fast
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_files_are_small_and_half_precision() -> None:
    from safetensors import safe_open

    folder = regard.mini.path()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_device_and_dtype() -> None:
    model, _ = regard.mini(dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("text", [demo.text(), "  two  spaces,\n\n\ttabs “quotes” – naïve 漢字 🙂 3.14159\n", ""])
def test_tokenizer_is_lossless(mini: Loaded, text: str) -> None:
    tokenizer = mini[1]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_chapter_fits_the_context_and_is_long(mini: Loaded) -> None:
    model, tokenizer = mini
    assert 900 <= len(tokenizer(demo.text())["input_ids"]) <= model.config.max_position_embeddings


def test_repeats_what_it_read(mini: Loaded) -> None:
    model, _ = mini
    once = torch.randint(3, 2048, (4, 60), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), once, once], 1)
    with torch.no_grad():
        likeliest = model(ids).logits.argmax(-1)
    assert (likeliest[:, 61:-1] == ids[:, 62:]).float().mean() >= 0.95


def test_recalls_facts_out_of_a_text(mini: Loaded) -> None:
    model, tokenizer = mini
    facts = {"Ada": "48213", "Borlin": "70455", "Teresa": "11928"}
    sentences = demo.text()[:1200].split(". ")
    for place, (name, number) in zip((1, 4, 6), facts.items(), strict=True):
        sentences.insert(place, f"The secret number of {name} is {number}")
    text = ". ".join(sentences)
    for name, number in facts.items():
        inputs = tokenizer(f"{text} The secret number of {name} is", return_tensors="pt")
        told = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(told[0, -5:]) == number


def test_left_padding_changes_nothing(mini: Loaded) -> None:
    model, tokenizer = mini
    texts = ["The code of Ada is 48213. The code of Ada is", "The house of Tom is 77. It rained. The house of Tom is"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    alone = [
        model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, do_sample=False)[0, -4:]
        for text in texts
    ]
    assert torch.equal(together, torch.stack(alone))


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(regard.mini.path(), tmp_path / "model")
    monkeypatch.setattr(import_module("regard.mini._mini"), "_FOLDER", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "checksums.json"])
def test_missing_file(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; install regard again"):
        regard.mini()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_file(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} \([\d,]+ bytes\) is not the file that was shipped"):
        regard.mini.path()


def test_damaged_checksums(copied: Path) -> None:
    (copied / "checksums.json").write_text("{")
    with pytest.raises(ValueError, match=r"checksums.json is not JSON"):
        check(copied)


def test_checksums_cover_every_file_but_the_card() -> None:
    folder = regard.mini.path()
    sums = json.loads((folder / "checksums.json").read_text())
    assert set(sums) == {path.name for path in folder.iterdir()} - {"README.md", "checksums.json"}


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install"):
        regard.mini()


def test_importing_regard_does_not_import_transformers() -> None:
    code = "import sys, regard; regard.mini.path(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
