"""Heads that change their mind without the image are found and strengthened."""

import pytest
import torch

import regard
from regard.steer.vision import vhr, vision_aware_heads
from regard.steer.vision._prompt import read_prompt
from regard.tokens import Heads, decoder_layers
from tests.steer.vision.conftest import Seer


def test_by_hand() -> None:
    # Divergences 9, 1, 2, 3, 0.5, 4; the first surges without the image, so its 9 counts as 0 and the median is 1.
    seen = torch.tensor([[1.0], [1.0], [2.0], [3.0], [0.5], [4.0]])
    unseen = torch.tensor([[10.0], [0.0], [0.0], [0.0], [0.0], [0.0]])
    assert vision_aware_heads(seen, unseen).tolist() == [False, False, True, True, False, True]
    # The same divergence with the image as its cause stays.
    assert vision_aware_heads(unseen, seen).tolist() == [True, False, False, True, False, True]


def outputs(seer: Seer, inputs: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """The outputs of a layer's heads for the last token, (heads, head_dim), before they are mixed."""
    kept = []
    module = dict(seer.model.named_modules())[layer.removesuffix(".*") + ".self_attn.o_proj"]
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1].reshape(4, 8)))
    with torch.no_grad():
        seer.model(**inputs)
    handle.remove()
    return kept[0]


def test_heads_are_found_layer_by_layer(seer: Seer) -> None:
    """Against two separate runs, with the reinforced layers before."""
    edit = vhr(seer.model, seer.inputs, by=3)
    layers = decoder_layers(seer.model)
    assert [path.rsplit(".", 1)[0] + ".*" for path in edit.heads] == layers[1:]
    kept = ~read_prompt(seer.model, seer.inputs).image[0]
    text = {"input_ids": seer.inputs["input_ids"][:, kept]}
    found: dict[str, Heads] = {}
    assert isinstance(edit.heads, dict)
    for path, heads in edit.heads.items():
        layer = path.rsplit(".", 1)[0] + ".*"
        if found:
            with regard.steer(seer.model, regard.Gate(3, layers=list(found), heads=dict(found))):
                seen, unseen = (outputs(seer, inputs, layer) for inputs in (seer.inputs, text))
        else:
            seen, unseen = (outputs(seer, inputs, layer) for inputs in (seer.inputs, text))
        assert vision_aware_heads(seen, unseen).nonzero()[:, 0].tolist() == heads
        found[path] = heads


def test_generate(seer: Seer) -> None:
    edit = vhr(seer.model, seer.inputs)
    with regard.steer(seer.model, edit):
        cached = seer.scores()
    with regard.steer(seer.model, edit):
        torch.testing.assert_close(seer.scores(use_cache=False), cached, atol=1e-4, rtol=1e-4)
    assert (cached - seer.scores()).abs().amax(-1).min() > 0.01
    assert str(edit).startswith("Gate(by=2.0, layers=['model.language_model.layers.1.self_attn'")


def test_one_text_at_a_time(seer: Seer) -> None:
    ids = seer.inputs["input_ids"].repeat(2, 1)
    with pytest.raises(ValueError, match="one text, got a batch of 2; pass one at a time"):
        vhr(seer.model, {"input_ids": ids})
