"""Informative image tokens are found in the vision tower and emphasized in the language model."""

import pytest
import torch

import regard
from regard.steer.vision import dual_stream, visual_streams
from regard.steer.vision._dual_stream import largest, outliers
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import Seer


def test_parts_and_outliers_by_hand() -> None:
    assert largest(torch.tensor([1.0, 5.0, 3.0, 2.0]), 0.5).tolist() == [False, True, True, False]
    assert outliers(torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])).tolist() == [False] * 4 + [True]  # above 4 + 1.5 · 2
    assert not outliers(torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0])).any()


def test_streams_are_those_of_the_stored_matrices(seer: Seer) -> None:
    with regard.watch(seer.model, keep_maps=True, layers="*vis*") as seen:
        seer.logits()
    first, late = (
        maps[0].dense()[0].sum(0) for maps in seen.maps.values()
    )  # of two layers, the last but one is the first
    if seer.name == "llava":
        local, received = first[0, 1:], first[:, 1:].sum(0)
    else:  # four patches make one token, and there is no class token
        local = received = first.sum(0).reshape(16, 4).sum(-1)
    assert late.shape == first.shape
    summary = outliers(local)
    chosen = (largest(local, 0.25) | largest(received, 0.2)) & ~summary
    found = visual_streams(seer.model, seer.inputs, spatial=0.2)
    assert torch.equal(found[0][0, seer.image], chosen)
    assert torch.equal(found[1][0, seer.image], summary)
    assert not found[0][0, seer.question].any()


def test_generate(seer: Seer) -> None:
    edits = dual_stream(seer.model, seer.inputs, layers=decoder_layers(seer.model)[1:])
    assert edits[0].by == 0.7
    with regard.steer(seer.model, *edits):
        scores, logits = seer.scores(), seer.logits()
    plain = seer.logits()
    torch.testing.assert_close(logits[:, :-1], plain[:, :-1], atol=1e-4, rtol=1e-4)  # the last query alone
    torch.testing.assert_close(logits[:, -1], scores[0], atol=1e-4, rtol=1e-4)
    assert (scores - seer.scores()).abs().amax(-1).min() > 1e-3


def test_several_images(seer: Seer) -> None:
    """Each text's tokens are those of its own images, in their order."""
    pixels = seer.inputs["pixel_values"]
    other = seer.inputs | {"pixel_values": torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))}
    alone = [visual_streams(seer.model, inputs, spatial=0.2) for inputs in (seer.inputs, other)]
    both = {name: torch.cat([value, other[name]]) for name, value in seer.inputs.items()}
    in_turn = {name: value.reshape(1, 44) if value.shape == (2, 22) else value for name, value in both.items()}
    for stream in (0, 1):
        wanted = torch.cat([found[stream] for found in alone])
        assert torch.equal(visual_streams(seer.model, both, spatial=0.2)[stream], wanted)
        if stream == 0:
            continue
        assert torch.equal(visual_streams(seer.model, in_turn, spatial=0.2)[stream], outlying_together(seer, in_turn))


def outlying_together(seer: Seer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with regard.watch(seer.model, keep_maps=True, layers="*vis*") as seen, torch.no_grad():
        seer.model(**inputs)
    first = list(seen.maps.values())[: 1 if seer.name == "llava" else 2]
    matrices = [matrix for maps in first for matrix in maps[0].dense().sum(1)]
    if seer.name == "llava":
        gaze = torch.cat([matrix[0, 1:] for matrix in matrices])
    else:
        gaze = torch.cat([matrix.sum(0).reshape(16, 4).sum(-1) for matrix in matrices])
    found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    found[inputs["input_ids"] == 59] = outliers(gaze)
    return found


def test_errors(seer: Seer) -> None:
    with pytest.raises(ValueError, match="needs local to be from 0 to 1, got 2"):
        visual_streams(seer.model, seer.inputs, local=2)
    with pytest.raises(ValueError, match="'tower' matches no attention call"):
        dual_stream(seer.model, seer.inputs, vision_layers="tower")
    with pytest.raises(ValueError, match="16 image tokens do not come of 22 patches in 1 images"):
        visual_streams(seer.model, seer.inputs, vision_layers=decoder_layers(seer.model)[0])
