"""A language model around every mixer does what models of transformers do; and a mixer stands in a pretrained one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import regard
from regard.mixers import DeltaRule, GatedDeltaRule, catalogue
from regard.mixers.in_place import MixerAttention, replace_attention
from regard.mixers.language_model import MixerConfig, MixerLM

CAUSAL = [name for name, kind in catalogue.mixers().items() if kind.facts.causal]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}


def model_of(mixer: str | list[str] = "GatedDeltaRule", **more: Any) -> MixerLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return MixerLM(MixerConfig(mixer, initializer_range=0.3, **sizes, **more)).eval()


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 40, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", CAUSAL)
def test_decodes_as_it_reads(mixer: str, tmp_path: Path) -> None:
    """Greedily, with beams, padded, and saved and loaded."""
    model, prompt = model_of(mixer), ids(2, 9)
    with torch.no_grad():
        written = model.generate(prompt, max_new_tokens=5, **GREEDY)
        read = model(written.sequences).logits[:, 8:-1]
        torch.testing.assert_close(torch.stack(written.logits, dim=1), read, atol=2e-4, rtol=2e-4)
        beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with_states, without = (model.generate(prompt, use_cache=use, **beams) for use in (True, False))
        assert torch.equal(with_states, without)
        alone = model.generate(prompt[:1, 4:], max_new_tokens=5, **GREEDY)
        mask = torch.ones_like(prompt)
        mask[0, :4] = 0
        padded = model.generate(prompt * mask, attention_mask=mask, max_new_tokens=5, **GREEDY)
        for one, other in zip(alone.logits, padded.logits, strict=True):
            torch.testing.assert_close(one[0], other[0], atol=2e-4, rtol=2e-4)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(again, MixerLM)
        torch.testing.assert_close(again(prompt).logits, model(prompt).logits)


def test_each_layer_may_have_its_own() -> None:
    model = model_of(["DeltaRule", "sliding-window"], mixer_arguments=[{"heads": 2}, {"heads": 4, "window": 3}])
    assert [type(layer.mixer).__name__ for layer in model.layers] == ["DeltaRule", "SlidingWindow"]
    assert model.layers[0].mixer.heads == 2
    with torch.no_grad(), regard.watch(model, regard.Received()) as seen:
        model(ids(1, 6))
    assert seen.layers == ["layers.0.mixer", "layers.1.mixer"]


def test_the_prompt_of_a_generation_is_watched() -> None:
    model, prompt = model_of("DeltaRule"), ids(1, 6)
    with torch.no_grad(), regard.watch(model, regard.Received(), passes=[0]) as seen:
        model.generate(prompt, max_new_tokens=3, **GREEDY)
    with torch.no_grad(), regard.watch(model, regard.Received()) as alone:
        model(prompt)
    np.testing.assert_allclose(seen.dataset().received, alone.dataset().received, atol=1e-5)
    with (
        pytest.raises(ValueError, match=r"watch the first pass alone with passes=\[0\]"),
        regard.watch(model, regard.Received()),
    ):
        model.generate(prompt, max_new_tokens=3, **GREEDY)


def test_what_it_holds_does_not_grow() -> None:
    model = model_of("DeltaRule")
    with torch.no_grad():
        sizes = [model(ids(1, tokens)).past_key_values.layers[0].state.bytes for tokens in (5, 500)]
    assert sizes[0] == sizes[1]


def test_it_learns() -> None:
    model, text = model_of("GatedDeltaRule").train(), ids(4, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        output = model(text, labels=text)
        assert output.past_key_values is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] / 2


def test_logits_of_the_last_tokens_alone() -> None:
    model, text = model_of(), ids(2, 7)
    with torch.no_grad():
        every = model(text).logits
        torch.testing.assert_close(model(text, logits_to_keep=2).logits, every[:, -2:])
        torch.testing.assert_close(model(inputs_embeds=model.embed_tokens(text)).logits, every)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("there is no mixer 'Mamba3'", lambda: MixerConfig("Mamba3")),
        ("3 mixers for 2 layers", lambda: MixerConfig(["DeltaRule"] * 3, num_hidden_layers=2)),
        ("1 mixer_arguments for 2 layers", lambda: MixerConfig(mixer_arguments=[{}], num_hidden_layers=2)),
        ("GatedDeltaRule cannot be made with {'depth': 3}", lambda: model_of(mixer_arguments={"depth": 3})),
        ("takes input_ids or inputs_embeds", lambda: model_of()()),
        ("takes an attention_mask of shape", lambda: model_of()(ids(2, 5), attention_mask=torch.ones(2, 3))),
        ("cannot be cropped", lambda: model_of()(ids(1, 5)).past_key_values.crop(-1)),
    ],
)
def test_what_is_refused(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- in the place of attention ------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("layers", [None, [0], [1, -1]])
def test_a_mixer_in_the_place_of_attention(layers: list[int] | None) -> None:
    model, prompt = llama(), ids(2, 9)
    put = replace_attention(model, lambda dim: GatedDeltaRule(dim, heads=2), layers)
    chosen = range(3) if layers is None else [layer % 3 for layer in layers]
    assert list(put) == [f"model.layers.{layer}.self_attn" for layer in chosen]
    assert all(model.get_submodule(path) is module for path, module in put.items())
    beams = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        written = model.generate(prompt, max_new_tokens=5, **GREEDY)
        read = model(written.sequences).logits[:, 8:-1]
        torch.testing.assert_close(torch.stack(written.logits, dim=1), read, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))
        alone = model.generate(prompt[:1, 4:], max_new_tokens=5, **GREEDY)
        mask = torch.ones_like(prompt)
        mask[0, :4] = 0
        padded = model.generate(prompt * mask, attention_mask=mask, max_new_tokens=5, **GREEDY)
        for one, other in zip(alone.logits, padded.logits, strict=True):
            torch.testing.assert_close(one[0], other[0], atol=1e-4, rtol=1e-4)
        with regard.watch(model, regard.Received()) as seen:
            model(prompt)
    assert len(seen.layers) == 3


def test_only_the_mixers_are_new() -> None:
    model, text = llama(), ids(1, 8)
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if "layers.1.self_attn" not in name}
    (put,) = replace_attention(model, lambda dim: DeltaRule(dim, heads=2), [1]).values()
    assert isinstance(put, MixerAttention)
    assert put.mixer.dim == 32
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model(text, labels=text).loss.backward()
    assert all(parameter.grad is not None for parameter in put.parameters())


def test_what_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="has no layers with a self_attn"):
        replace_attention(torch.nn.Linear(3, 3), lambda dim: DeltaRule(dim))
    with pytest.raises(ValueError, match="is of width 32, and the mixer made for it of width 16"):
        replace_attention(llama(), lambda dim: DeltaRule(dim // 2, heads=2))
    with pytest.raises(IndexError, match="layer 7 was chosen"):
        replace_attention(llama(), lambda dim: DeltaRule(dim, heads=2), [7])
    model, text = llama(), ids(1, 5)
    with torch.no_grad():
        cache = model(text).past_key_values
        replace_attention(model, lambda dim: DeltaRule(dim, heads=2), [0])
        with pytest.raises(ValueError, match="layer 0 of the cache holds what another layer kept of a text"):
            model(text[:, :1], past_key_values=cache)
