"""Visual sinks give what they have too much of."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import regard
from regard.steer.vision import RedistributeSinks, var
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import Seer


def probabilities(*rows: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of one head whose matrix has these rows, and values that show it."""
    matrix = torch.tensor(rows)
    return matrix.log()[None, None], torch.eye(matrix.shape[1])[None, None], torch.eye(matrix.shape[1])[None, None]


def test_by_hand() -> None:
    # Keys: a text sink, an image sink, two image tokens, text. Image mass and non-sink ratio of the rows:
    # 0.5 and 0.8 (edited); 0.5 and 0.2 (too few non-sinks); 0.15 and 0.93 (looks elsewhere).
    rows = ([0.3, 0.1, 0.3, 0.1, 0.2], [0.3, 0.4, 0.05, 0.05, 0.2], [0.3, 0.01, 0.1, 0.04, 0.55])
    edit = RedistributeSinks(sinks=[0, 1], image=[1, 2, 3], ratio=0.5, share=0.6, least=0.2)
    with regard.steer(None, edit):
        output = functional.scaled_dot_product_attention(*probabilities(*rows), scale=1.0)[0, 0]
    freed = 0.6 * 0.4  # of the first row, shared out 3 : 1
    wanted = torch.tensor([[0.12, 0.04, 0.3 + freed * 0.75, 0.1 + freed * 0.25, 0.2], *rows[1:]])
    torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-5)


def massive(seer: Seer, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first token and one of the image have a massive activation in dimension 5 from the third layer on."""
    layer = dict(seer.model.named_modules())[decoder_layers(seer.model)[1].removesuffix(".*")]
    forward = layer.forward

    def spiked(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        output = forward(hidden, *args, **kwargs)
        if output.shape[1] > 1:
            output = output.clone()
            output[:, [0, position], 5] = 1e4
        return output

    monkeypatch.setattr(layer, "forward", spiked)


def test_sinks_are_found_and_emptied(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    massive(seer, 6, monkeypatch)
    edits = var(seer.model, seer.inputs, ratio=0, least=0, threshold=5, share=1)
    assert [edit.layers for edit in edits] == decoder_layers(seer.model)[2:-1]
    assert edits[0].sinks.nonzero()[:, 1].tolist() == [0, 6]
    with regard.steer(seer.model, *edits), regard.watch(seer.model, keep_maps=True, layers=edits[0].layers) as seen:
        steered = seer.logits()
    (maps,) = seen.maps.values()
    matrix = maps[0].dense()
    assert (matrix[:, :, 18:, [0, 6]] < 1e-6).all()
    assert (matrix[:, :, :18, 0] > 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 4, 22))
    assert (steered - seer.logits()).abs().max() > 0.01


def test_generate_goes_on_with_the_prompt(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    massive(seer, 6, monkeypatch)
    edits = var(seer.model, seer.inputs, ratio=0, least=0, threshold=5, dimensions=[5])
    with regard.steer(seer.model, *edits):
        cached = seer.scores()
    with regard.steer(seer.model, *edits):
        torch.testing.assert_close(seer.scores(use_cache=False), cached, atol=1e-4, rtol=1e-4)
    assert (cached - seer.scores()).abs().amax(-1).min() > 0.01


def test_no_sink(seer: Seer) -> None:
    with pytest.raises(
        ValueError, match=r"no visual sink: in the dimensions \[\d+, \d+\] .* the threshold is 20; lower it"
    ):
        var(seer.model, seer.inputs)
    with pytest.raises(ValueError, match=r"knows the layers .* got \['layers.9'\]"):
        var(seer.model, seer.inputs, layers=["layers.9"])
    with pytest.raises(ValueError, match="text 0 of the batch has no image token"):
        var(seer.model, {"input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(
        ValueError, match=r"needed to find the image, got the inputs pixel_values; pass what a processor"
    ):
        var(seer.model, {"pixel_values": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"needed to find the image, got shape \(3,\)"):
        var(seer.model, {"input_ids": torch.tensor([1, 2, 3])})
    with pytest.raises(ValueError, match="RedistributeSinks needs share to be a number from 0 to 1, got 2"):
        RedistributeSinks(0, 1, share=2)
