"""The image gets more attention in the higher layers, and there alone."""

import pytest
import torch

import regard
from regard.steer.vision import image_boost
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import Seer


def matrix(seer: Seer, layer: int, *edits: regard.Edit) -> torch.Tensor:
    name = decoder_layers(seer.model)[layer]
    with regard.steer(seer.model, *edits), regard.watch(seer.model, keep_maps=True, layers=name) as seen:
        seer.logits()
    return next(iter(seen.maps.values()))[0].dense()


def test_the_rule_in_the_first_layer_that_is_boosted(seer: Seer) -> None:
    kept = []
    keep = regard.Custom(lambda call, heads: kept.append(call) or call, layers=decoder_layers(seer.model)[2])
    plain = matrix(seer, 2, keep)
    boosted = matrix(seer, 2, image_boost(seer.model, by=0.5))
    keys = kept[0].key.repeat_interleave(2, 1)
    logits = (kept[0].query[:, :, -1:] @ keys.mT)[:, :, 0] * kept[0].factor
    torch.testing.assert_close(torch.softmax(logits, -1), plain[:, :, -1], atol=1e-5, rtol=1e-4)
    logits[..., seer.image] += 0.5 * logits[..., seer.image].abs()
    torch.testing.assert_close(torch.softmax(logits, -1), boosted[:, :, -1], atol=1e-5, rtol=1e-4)
    assert (boosted[:, :, -1, seer.image].sum(-1) > plain[:, :, -1, seer.image].sum(-1)).all()
    torch.testing.assert_close(boosted[:, :, :-1], plain[:, :, :-1])
    torch.testing.assert_close(matrix(seer, 1, image_boost(seer.model, by=3)), matrix(seer, 1, regard.Gate(1.0)))


def test_generate(seer: Seer) -> None:
    edit = image_boost(seer.model)
    with regard.steer(seer.model, edit):
        scores, logits = seer.scores(), seer.logits()
    torch.testing.assert_close(logits[:, -1], scores[0], atol=1e-4, rtol=1e-4)
    assert (scores - seer.scores()).abs().amax(-1).min() > 0.01
    with pytest.raises(ValueError, match="Emphasize needs by to be a finite number of at least 0, got -1"):
        image_boost(seer.model, by=-1)
