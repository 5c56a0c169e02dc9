"""The image is found where the model's config says."""

import pytest
import torch
import transformers as hf

import regard
from regard.tokens import ImageTokens, decoder_layers, image_tokens
from tests.steer.vision.conftest import SMALL, Seer


def test_the_tokens_of_the_config(seer: Seer) -> None:
    found = image_tokens(seer.model)
    assert found == ImageTokens((59,) if seer.name == "llava" else (59, 58))
    mask = found(seer.inputs["input_ids"])
    wanted = torch.zeros_like(mask)
    wanted[:, seer.image] = True
    assert torch.equal(mask, wanted)


def test_they_select_keys_also_in_generate(seer: Seer) -> None:
    layers = decoder_layers(seer.model)
    by_ids = regard.Reweight(image_tokens(seer.model), 0.1, layers=layers)
    by_position = regard.Reweight(seer.image, 0.1, layers=layers)
    with regard.steer(seer.model, by_ids):
        steered, tokens = seer.logits(), seer.generate()
    with regard.steer(seer.model, by_position):
        torch.testing.assert_close(seer.logits(), steered)
        assert torch.equal(seer.generate(), tokens)
    assert (steered - seer.logits()).abs().max() > 0.01


def test_layers_are_those_of_the_language_model(seer: Seer) -> None:
    layers = decoder_layers(seer.model)
    assert len(layers) == 4
    with regard.watch(seer.model, regard.Entropy(), layers=layers) as seen:
        seer.logits()
    assert [path.rsplit(".", 1)[0] + ".*" for path in seen.layers] == layers


def test_a_text_model_has_none() -> None:
    config = hf.LlamaConfig(**SMALL, vocab_size=60)
    model = hf.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM names no image token"):
        image_tokens(model)
    with pytest.raises(ValueError, match="Linear has no ModuleList of layers"):
        decoder_layers(torch.nn.Linear(2, 2))
