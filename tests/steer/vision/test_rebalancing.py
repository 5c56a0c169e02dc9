"""The scores move away from the noisy image's and towards the significant tokens'."""

import pytest
import torch

import regard
from regard.steer.vision import Rebalancing, noised, significant_tokens
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import WORDS, Seer


def test_noise_by_hand() -> None:
    betas = [1e-5 + (5e-3 - 1e-5) / (1 + 2.718281828459045 ** -(-6 + 12 * t / 999)) for t in range(3)]
    left = (1 - betas[0]) * (1 - betas[1]) * (1 - betas[2])
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    found = noised({"pixel_values": torch.ones(2, 3), "other": 1}, step=2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found["pixel_values"], left**0.5 + (1 - left) ** 0.5 * noise, atol=1e-5, rtol=1e-5)
    assert found["other"] == 1
    with pytest.raises(ValueError, match="no pixel_values to put noise on among other"):
        noised({"other": 1})
    with pytest.raises(ValueError, match="step from 0 to 999, got 1000"):
        noised({"pixel_values": torch.ones(1)}, step=1000)


def test_significant_tokens_are_those_of_the_stored_matrices(seer: Seer) -> None:
    with regard.watch(seer.model, keep_maps=True, layers=decoder_layers(seer.model)) as seen:
        seer.logits()
    gaze = torch.stack([maps[0].dense()[0, :, -1].mean(0) for maps in seen.maps.values()]).mean(0)
    wanted = set((gaze[seer.image].topk(4).indices + 2).tolist())
    assert set(significant_tokens(seer.model, seer.inputs, keep=0.25).nonzero()[:, 1].tolist()) == wanted


def test_generate(seer: Seer) -> None:
    noisy = noised(seer.inputs)
    processor = Rebalancing(seer.model, seer.inputs, alpha=1, gamma=0.5, beta=1e-6, noisy=noisy)
    scores = seer.scores(logits_processor=[processor])
    others = ~processor.significant
    others[:, :2] = others[:, 18:] = False
    plain = seer.logits()[:, -1]
    with torch.no_grad():
        text = seer.model(**noisy).logits[:, -1, :WORDS]
    with regard.steer(seer.model, regard.Block(others, layers=decoder_layers(seer.model))):
        visual = seer.logits()[:, -1]
    wanted = plain + (plain - text) + 0.5 * (visual - plain)
    allowed = scores[0].isfinite()
    torch.testing.assert_close(scores[0][allowed], wanted[allowed], atol=1e-3, rtol=1e-3)
    assert scores.shape == (4, 1, WORDS)


def test_without_branches_the_scores_stay(seer: Seer) -> None:
    processor = Rebalancing(seer.model, seer.inputs, alpha=0, gamma=0, beta=1e-9)
    plain = seer.scores()
    torch.testing.assert_close(seer.scores(logits_processor=[processor]), plain, atol=1e-4, rtol=1e-4)
    all_of_it = Rebalancing(seer.model, seer.inputs, alpha=0, gamma=1, beta=1e-9, keep=1)
    torch.testing.assert_close(seer.scores(logits_processor=[all_of_it]), plain, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="keep to be greater than 0 and at most 1, got 0"):
        Rebalancing(seer.model, seer.inputs, keep=0)
