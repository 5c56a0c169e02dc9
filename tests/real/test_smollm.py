"""A pretrained model of 30 layers, seen, steered and compressed as it is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Module
from typer.testing import CliRunner

import regard
from bench import real_model
from regard.cli import app
from regard.models import write

pytestmark = pytest.mark.real
STORY = (
    "Mary and John went to the store on Saturday morning. They wanted to buy bread, milk and a newspaper, but the shop had "
    "run out of bread. The owner, an old man with a grey beard, told them that the baker would come at noon. So they sat "
    "down on the bench before the door and read the newspaper together until the clock of the church struck twelve. "
)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", " Paris"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
    ],
)
def test_it_knows(smollm: tuple[Module, Any], prompt: str, answer: str) -> None:
    model, tokenizer = smollm
    assert write(model, tokenizer, tokenizer(prompt, return_tensors="pt"), 3).text.startswith(answer)


def test_every_head_is_seen_as_stored_attention_has_it(smollm: tuple[Module, Any]) -> None:
    model, tokenizer = smollm
    inputs = tokenizer(STORY * 3, return_tensors="pt")
    with torch.no_grad(), regard.watch(model, regard.Mass({"first": 0}), regard.Entropy(), regard.Received()) as seen:
        model(**inputs)
    found = seen.dataset()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            stored = torch.stack(model(**inputs, output_attentions=True).attentions)  # (layer, batch, head, query, key)
    finally:
        model.set_attn_implementation("sdpa")
    assert (found.sizes["layer"], found.sizes["head"]) == (30, 9)
    np.testing.assert_allclose(found.mass[..., 0], stored[..., 0], atol=2e-4)
    np.testing.assert_allclose(found.received, stored.sum(-2), atol=2e-2, rtol=1e-3)
    entropy = -(stored * stored.clamp(min=1e-30).log()).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-3)


def test_sinks_begin_in_the_middle(smollm: tuple[Module, Any]) -> None:
    """Early layers read the text; from layer 12 on heads give far more of their attention to the first token."""
    model, tokenizer = smollm
    with torch.no_grad(), regard.watch(model, regard.Mass({"first": 0})) as seen:
        model(**tokenizer(STORY, return_tensors="pt"))
    share = seen.dataset().mass.isel(segment=0, query=slice(32, None)).mean(("batch", "query", "head"))
    assert float(share[12:].mean()) > 3 * float(share[:12].mean())


def test_all_kept_is_all_as_it_was(smollm: tuple[Module, Any]) -> None:
    model, tokenizer = smollm
    inputs = tokenizer(STORY, return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with regard.compress(model, regard.cache.KeepAll()):
        assert torch.equal(model.generate(**inputs, **options), plain)
    with regard.compress(model, regard.cache.SnapKV(budget=0.5)) as cache:
        model.generate(**inputs, **options)
    report, read = cache.report(), inputs["input_ids"].shape[1]
    written = options["max_new_tokens"] - 1
    assert {layer.seen for layer in report.layers} == {read + written}
    assert {kept for layer in report.layers for kept in layer.kept} == {-(-read // 2) + written}


def test_who_is_hidden_is_not_named(smollm: tuple[Module, Any]) -> None:
    model, tokenizer = smollm
    prompt = "When Mary and John went to the store, John gave a drink to"
    inputs = tokenizer(prompt, return_tensors="pt")
    with regard.steer(model, regard.Reweight(keys=regard.tokens.locate("Mary", prompt, tokenizer), by=0.0)):
        written = write(model, tokenizer, inputs, 1).text
    assert written != " Mary"


def test_the_commands_take_the_file(smollm: tuple[Module, Any], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = CliRunner().invoke(
        app, ["look", "--model", str(real_model.path()), "--prompt", STORY, "--out", str(report)]
    )
    assert result.exit_code == 0, result.output
    assert "SmolLM2" in report.read_text(encoding="utf-8")
