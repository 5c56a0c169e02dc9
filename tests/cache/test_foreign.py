"""Caches and layers of a cache that hold keys in a way of their own: left alone, or refused before the first token."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer

import regard
from regard.cache import KeepAll, Knorm, KVzip, Policy, SnapKV
from tests.cache.conftest import GROUPED, decoder, texts
from tests.cache.test_kvzip import Letters


def mllama() -> Any:
    """Layers 1 and 3 attend to an image, whose states they cache."""
    torch.manual_seed(0)
    sizes = GROUPED | {"num_hidden_layers": 4}
    sizes.pop("head_dim")
    model = hf.MllamaForCausalLM(hf.MllamaTextConfig(**sizes, cross_attention_layers=[1, 3])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)  # of what the image adds, 0 before training
    return model


def image(tokens: int) -> dict[str, Tensor]:
    """What a text of so many tokens may see of an image of seven."""
    return {
        "cross_attention_mask": torch.zeros(1, 1, tokens, 7),
        "full_text_row_masked_out_mask": torch.ones(1, 1, tokens, 1),
    }


@pytest.mark.parametrize("policy", [KeepAll(), Knorm(budget=5), KVzip(Letters(), budget=5)], ids=str)
def test_what_an_image_is_remembered_by_is_left_alone(policy: Policy) -> None:
    """Mllama, with an image and without: the text's layers are compressed, and the steps are as with these entries masked."""
    model, ids, states = mllama(), texts(14)["input_ids"], torch.randn(1, 7, 32)
    for seen in ({"cross_attention_states": states}, {}):
        given = image(12) if seen else {}
        with torch.no_grad(), regard.compress(model, policy) as block:
            past = model(ids[:, :12], use_cache=True, **seen, **given).past_key_values
        left = {layer.layer: layer.positions for layer in block.report().layers}
        assert list(left) == [0, 2]

        def hide(call: regard.AttentionCall, heads: Tensor, left: Any = left) -> regard.AttentionCall:
            number = int(call.place.path.split(".")[2])
            if number not in left:
                return call
            visible = torch.ones(14, 14, dtype=torch.bool).tril().repeat(1, 4, 1, 1)
            visible[:, :, 12:, :12] &= left[number][:, :, None].repeat_interleave(2, dim=1)
            return regard.AttentionCall(call.query, call.key, call.value, visible, scale=call.scale, enable_gqa=True)

        with torch.no_grad():
            given = image(1) if seen else {}
            steps = [
                model(ids[:, place : place + 1], past_key_values=past, **given).logits[:, -1] for place in (12, 13)
            ]
            with regard.steer(model, regard.Custom(hide)):
                given = image(14) if seen else {}
                expected = model(ids, use_cache=False, **seen, **given).logits[:, 12:]
        torch.testing.assert_close(torch.stack(steps, dim=1), expected, atol=1e-5, rtol=1e-4)


def test_a_model_of_sliding_windows_alone_is_left_alone_with_a_word() -> None:
    model = hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)).eval()
    inputs, options = texts(12), {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with (
        pytest.warns(UserWarning, match=r"leaves MistralForCausalLM alone: every layer keeps a sliding window") as told,
        regard.compress(model, SnapKV(budget=0.5, window=2)) as block,
    ):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert len(told) == 1
    report = block.report()
    assert report.kept == 1.0
    assert "(nothing is dropped: every layer keeps a sliding window, and no more than it)" in str(report)
    with pytest.warns(UserWarning, match=r"leaves MistralForCausalLM alone"), \
            regard.compress(model, KVzip(Letters(), budget=0.5)):  # fmt: skip
        model.generate(**inputs, **options)


class Rounded(QuantizedLayer):
    """A quantised layer of transformers, whose own need a further package."""

    def _quantize(self, tensor: Any, axis: Any = None) -> Any:
        return tensor.half()

    def _dequantize(self, tensor: Any) -> Any:
        return tensor.float()


def test_quantised_caches_are_refused_before_the_first_token() -> None:
    model, written = decoder("llama"), list[int]()
    stop = hf.StoppingCriteriaList([lambda ids, scores, **_: written.append(1) or torch.zeros(1, dtype=torch.bool)])
    cache = Cache(layers=[Rounded() for _ in range(3)])
    with pytest.raises(ValueError, match=r"^compress .* layers are quantised; .*DynamicCache") as refusal, \
            regard.compress(model, Knorm(budget=0.5)):  # fmt: skip
        model.generate(**texts(12), past_key_values=cache, stopping_criteria=stop, max_new_tokens=3)
    assert not written
    assert "\n" not in str(refusal.value)


def test_a_static_cache_is_refused_before_the_first_token() -> None:
    model = decoder("llama")
    with pytest.raises(ValueError, match=r"layers are StaticLayer; use a DynamicCache, generate's default, instead"), \
            regard.compress(model, Knorm(budget=0.5)):  # fmt: skip
        model.generate(**texts(12), cache_implementation="static", max_new_tokens=3)
