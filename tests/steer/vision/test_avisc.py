"""What the blind tokens alone suggest is taken from the scores."""

import pytest
import torch

import regard
from regard.steer.vision import AvisC, blind_tokens
from regard.steer.vision.avisc import stared_at
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import WORDS, Seer


def test_blind_tokens_by_hand() -> None:
    # Three layers' attention to five image tokens: of all, 0.6 is in the second layer and 0.3 in the first.
    image = torch.tensor([[False, True, True, True, True, True]])
    gaze = torch.tensor(
        [
            [[0.0, 0.02, 0.02, 0.02, 0.02, 0.22]],
            [[0.0, 0.40, 0.05, 0.05, 0.05, 0.05]],
            [[0.0, 0.02, 0.02, 0.02, 0.02, 0.02]],
        ]
    )
    assert stared_at(gaze, image, 0.5, 1.0).nonzero()[:, 1].tolist() == [1]
    # With the first layer: means 0.21, …, 0.135, of mean 0.09 and deviation 0.08.
    assert stared_at(gaze, image, 0.7, 1.0).nonzero()[:, 1].tolist() == [1]
    assert stared_at(gaze, image, 0.7, 0.5).nonzero()[:, 1].tolist() == [1, 5]


def test_blind_tokens_are_those_of_the_stored_matrices(seer: Seer) -> None:
    with regard.watch(seer.model, keep_maps=True, layers=decoder_layers(seer.model)) as seen:
        seer.logits()
    rows = torch.stack([maps[0].dense()[:, :, -1].mean(1) for maps in seen.maps.values()])
    image = torch.zeros(1, 22, dtype=torch.bool)
    image[:, seer.image] = True
    assert torch.equal(blind_tokens(seer.model, seer.inputs), stared_at(rows * image, image, 0.5, 1.0))


def test_generate(seer: Seer) -> None:
    processor = AvisC(seer.model, seer.inputs, alpha=2, beta=1e-6)
    assert 0 < processor.blind.sum() < 16
    scores, plain = seer.scores(logits_processor=[processor]), seer.scores()
    with torch.no_grad():
        embeddings = []
        decoder = seer.model.get_decoder()
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        seer.logits()
        hook.remove()
        kept = processor.blind.clone()
        kept[:, :2] = kept[:, 18:] = True
        forward = decoder.forward
        decoder.forward = lambda **kwargs: forward(**kwargs | {"inputs_embeds": embeddings[0] * kept[..., None]})
        biased = seer.logits()[:, -1]
        decoder.forward = forward
    wanted = 3 * plain[0] - 2 * biased[:, :WORDS]
    allowed = scores[0].isfinite()
    torch.testing.assert_close(scores[0][allowed], wanted[allowed], atol=1e-3, rtol=1e-3)
    assert scores.shape == (4, 1, WORDS)
    with pytest.raises(ValueError, match="AvisC needs beta to be greater than 0 and at most 1, got 0"):
        AvisC(seer.model, seer.inputs, beta=0)
    with pytest.raises(ValueError, match="gamma to be from 0 to 1, got 2"):
        blind_tokens(seer.model, seer.inputs, gamma=2)
