"""Gaze shifts are read from the question and guide the answer."""

import math

import pytest
import torch
from torch.nn import functional

import regard
from regard.steer.vision import FuseGaze, gaze_saliency, gift
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import Seer


def test_fusion_by_hand() -> None:
    # Two heads over the keys image, image, question, other; two queries, of which the last is edited.
    matrix = torch.tensor([[[0.4, 0.2, 0.3, 0.1]] * 2, [[0.1, 0.1, 0.6, 0.2]] * 2])
    edit = FuseGaze(torch.tensor([[0.5, 1.0, 0.0, 0.0]]), image=[0, 1], question=2, alpha=2.0, beta=0.9)
    with regard.steer(None, edit):
        output = functional.scaled_dot_product_attention(
            matrix.log()[None], torch.eye(4).expand(1, 2, 4, 4), torch.eye(4).expand(1, 2, 4, 4), scale=1.0
        )[0]
    # The first head looks at the image most, the second at the question.
    gained = 0.4 * math.e + 0.2 * math.exp(2)
    wanted = matrix.clone()
    wanted[0, 1, :2] = torch.tensor([0.4 * math.e, 0.2 * math.exp(2)])
    wanted[1, 1, 2] *= 0.9 * gained / 0.6
    torch.testing.assert_close(output, wanted / wanted.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_saliency_is_that_of_the_stored_matrix(seer: Seer) -> None:
    words = torch.zeros(1, 22, dtype=torch.bool)
    words[:, [18, 20, 21]] = True
    with regard.watch(seer.model, keep_maps=True, layers=decoder_layers(seer.model)) as seen:
        seer.logits()
    best = None
    for maps in seen.maps.values():
        matrix = maps[0].dense()[0]
        shift = (matrix[:, [18, 20, 21], 2:18] - matrix[:, [17, 19, 20], 2:18]).clamp(min=0)
        heads = shift.sum((1, 2)).topk(2).indices
        found = shift[heads].sum((0, 1))
        best = found if best is None or found.sum() > best.sum() else best
    mean, deviation = best.mean(), best.std()
    best = best.clamp(mean - 3 * deviation, mean + 3 * deviation)
    saliency = gaze_saliency(seer.model, seer.inputs, words)
    torch.testing.assert_close(saliency[0, 2:18], (best - best.min()) / (best.max() - best.min()), atol=1e-4, rtol=1e-3)
    assert saliency[0, :2].sum() == saliency[0, 18:].sum() == 0


def test_generate(seer: Seer) -> None:
    edit = gift(seer.model, seer.inputs, layers=decoder_layers(seer.model)[1:3])
    with regard.steer(seer.model, edit):
        scores = seer.scores()
    plain = seer.scores()
    assert (scores - plain).abs().amax(-1).min() > 0.01
    with regard.steer(seer.model, edit):
        steered = seer.logits()
    torch.testing.assert_close(steered[:, :-1], seer.logits()[:, :-1], atol=1e-4, rtol=1e-4)  # the last query alone
    torch.testing.assert_close(steered[:, -1], scores[0], atol=1e-4, rtol=1e-4)


def test_errors(seer: Seer) -> None:
    with pytest.raises(ValueError, match=r"words must be booleans of shape \(1, 22\), got torch.int64 \(1, 3\)"):
        gaze_saliency(seer.model, seer.inputs, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no text comes after its image"):
        gift(seer.model, {"input_ids": torch.tensor([[1, 59, 59]])})
    with pytest.raises(ValueError, match=r"saliency of shape \(batch, tokens\), got \(3,\)"):
        FuseGaze(torch.zeros(3), 0, 1)
