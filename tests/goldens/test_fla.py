"""Layers and models of flash-linear-attention, as its own Triton kernels ran them, and the same as mixers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.mixers import load_layer, load_model

with safe_open(Path(__file__).with_name("fla.safetensors"), "pt") as file:
    GOLDEN: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    CONFIGS: dict[str, dict[str, Any]] = json.loads(file.metadata()["configs"])
LAYERS, MODELS = ([name for name in CONFIGS if name.startswith(kind)] for kind in ("layer", "model"))
X, MASK, IDS = GOLDEN["x"], GOLDEN["mask"].bool(), GOLDEN["ids"]
TOLERANCE = {"atol": 3e-5, "rtol": 1e-4}


def weights_of(name: str) -> dict[str, Tensor]:
    start = f"{name}/weights."
    return {key.removeprefix(start): tensor for key, tensor in GOLDEN.items() if key.startswith(start)}


def test_every_kind_is_there() -> None:
    kinds = [{CONFIGS[name]["model_type"] for name in names} for names in (LAYERS, MODELS)]
    assert kinds == [{"gla", "delta_net", "gated_deltanet"}] * 2


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    mixer = load_layer(weights_of(name), CONFIGS[name])
    torch.testing.assert_close(mixer(X)[0], GOLDEN[f"{name}/whole"], **TOLERANCE)
    padded, _ = mixer(X, mask=MASK)
    torch.testing.assert_close(padded[MASK], GOLDEN[f"{name}/padded"][MASK], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers_read_and_decode(name: str) -> None:
    mixer = load_layer(weights_of(name), CONFIGS[name])
    read, state = mixer(X[:, :66])
    steps = []
    for token in (66, 67):
        step, state = mixer.decode(X[:, token], state)
        steps.append(step)
    torch.testing.assert_close(torch.cat([read, torch.stack(steps, 1)], 1), GOLDEN[f"{name}/pieces"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    save_file(weights_of(name), tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    torch.testing.assert_close(model(IDS).logits, GOLDEN[f"{name}/logits"], atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, GOLDEN[f"{name}/logits"], atol=1e-4, rtol=1e-4)
