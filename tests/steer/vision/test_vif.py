"""Attention moves to the image in middle layers and back to the instruction in deep ones."""

from importlib import import_module

import pytest
import torch

import regard
from regard.steer.vision import inactive_tokens, vif
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import Seer


def test_inactive_tokens_by_hand() -> None:
    # Low and steady; low but changing; high; not of the image; and others to make quartiles.
    received = torch.tensor([[0.10, 0.1, 0.5, 0.01, 0.6, 0.7, 0.5, 0.6], [0.12, 0.3, 0.5, 0.01, 0.6, 0.7, 0.5, 0.6]])
    image = torch.tensor([True, True, True, False, True, True, True, True])
    assert inactive_tokens(received, image).nonzero()[:, 0].tolist() == [0]
    assert not inactive_tokens(received, image, fluctuation=0.05).any()


def matrix(seer: Seer, layer: int, *edits: regard.Edit) -> torch.Tensor:
    name = decoder_layers(seer.model)[layer]
    with regard.steer(seer.model, *edits), regard.watch(seer.model, keep_maps=True, layers=name) as seen:
        seer.logits()
    return next(iter(seen.maps.values()))[0].dense()


def test_the_rules(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    inactive = torch.zeros(22, dtype=torch.bool)
    inactive[[3, 5]] = True
    monkeypatch.setattr(import_module("regard.steer.vision._vif"), "inactive_tokens", lambda received, image: inactive)
    every = decoder_layers(seer.model)
    edits = vif(seer.model, seer.inputs, middle=[every[1]], deep=[every[2]])
    active = torch.zeros(22, dtype=torch.bool)
    active[seer.image] = True
    active &= ~inactive
    given = inactive.clone()
    given[seer.question] = True

    sharp = torch.softmax(matrix(seer, 1, regard.Gate(1.0)).log() / 0.8, -1)
    wanted = moved(sharp, given, active, 0.1)
    torch.testing.assert_close(matrix(seer, 1, *edits), wanted, atol=1e-5, rtol=1e-4)

    plain = matrix(seer, 2, *edits[:2], regard.Gate(1.0))
    wanted = moved(plain, active | inactive, torch.arange(22) >= 18, 0.3)
    torch.testing.assert_close(matrix(seer, 2, *edits), wanted, atol=1e-5, rtol=1e-4)


def moved(plain: torch.Tensor, source: torch.Tensor, target: torch.Tensor, share: float) -> torch.Tensor:
    budget = share * plain[..., source].sum(-1, keepdim=True)
    there = plain[..., target].sum(-1, keepdim=True)
    result = torch.where(source, plain * (1 - share), plain + torch.where(target, plain / there * budget, 0))
    return torch.where(there > 0, result, plain)


def test_generate(seer: Seer) -> None:
    edits = vif(seer.model, seer.inputs)
    with regard.steer(seer.model, *edits):
        cached = seer.scores()
    with regard.steer(seer.model, *edits):
        torch.testing.assert_close(seer.scores(use_cache=False), cached, atol=1e-4, rtol=1e-4)
    assert (cached - seer.scores()).abs().amax(-1).min() > 1e-3
    with pytest.raises(ValueError, match="no text comes after its image"):
        vif(seer.model, {"input_ids": torch.tensor([[1, 59, 59]])})
