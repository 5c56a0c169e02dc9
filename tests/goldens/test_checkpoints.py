"""Linear layers and models of transformers, run here, and the same as mixers."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import regard
from regard.mixers import GatedDeltaRule, MixerLM, load_layer, load_model, replace_linear_layers

WIDTH, TOKENS, PADDING = 24, 71, 4
HEADS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3,
}  # fmt: skip
ATTENTION = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "intermediate_size": 16,
}
SIZES: dict[str, Any] = {"hidden_size": WIDTH, **HEADS, **ATTENTION, "rms_norm_eps": 1e-5}
MAMBA: dict[str, Any] = {"hidden_size": WIDTH, "state_size": 5, "num_hidden_layers": 2, "vocab_size": 40}
LAYERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Mamba": lambda: of(MambaMixer, hf.MambaConfig(**MAMBA)),
    "Mamba, other biases": lambda: of(
        MambaMixer,
        hf.MambaConfig(**MAMBA, use_bias=True, use_conv_bias=False, conv_kernel=3, expand=3, time_step_rank=4),
    ),
    "Qwen3-Next": lambda: of(Qwen3NextGatedDeltaNet, hf.Qwen3NextConfig(**SIZES)),
    "Qwen3.5": lambda: of(Qwen3_5GatedDeltaNet, hf.Qwen3_5TextConfig(**SIZES)),
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}


def of(kind: Any, config: Any) -> tuple[Any, Any]:
    """A layer whose parameters are not those it begins with, and its configuration."""
    return shaken(kind(config, layer_idx=0)), config


def shaken(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def padding(batch: int, tokens: int) -> Tensor:
    """Before the last text."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, :PADDING] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    theirs, config = LAYERS[name]()
    mixer, x = load_layer(theirs, config), torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(mixer(x)[0], theirs(x), atol=1e-5, rtol=1e-4)
    if name != "Mamba, other biases":  # theirs takes the bias of its projection for tokens before the text
        mask = padding(2, TOKENS)
        expected, (found, _) = theirs(x, attention_mask=mask), mixer(x, mask=mask.bool())
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layers_read_and_decode(name: str) -> None:
    theirs, config = LAYERS[name]()
    mixer, x, cache = load_layer(theirs, config), torch.randn(2, TOKENS, WIDTH), hf.DynamicCache(config=config)
    found, state = mixer(x[:, :-3])
    torch.testing.assert_close(found, theirs(x[:, :-3], cache_params=cache), atol=1e-5, rtol=1e-4)
    for token in range(TOKENS - 3, TOKENS):
        found, state = mixer.decode(x[:, token], state)
        expected = theirs(x[:, token : token + 1], cache_params=cache)[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_as_it_begins() -> None:
    """Small queries beside the norm's epsilon, which weigh there; and its weights by name, as a checkpoint has them."""
    config = hf.Qwen3NextConfig(**SIZES)
    theirs, x = Qwen3NextGatedDeltaNet(config, layer_idx=0).eval(), 0.1 * torch.randn(2, 70, WIDTH)
    mixer = load_layer(theirs.state_dict(), config.to_dict())
    assert isinstance(mixer, GatedDeltaRule)
    assert (mixer.heads, mixer.num_v_heads) == (2, 6)
    torch.testing.assert_close(mixer(x)[0], theirs(x), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_model_of_mamba(tmp_path: Path) -> None:
    theirs = shaken(hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)))
    theirs.save_pretrained(tmp_path)
    model, ids, mask = load_model(tmp_path), torch.randint(1, 40, (2, 12)), padding(2, 12)
    assert isinstance(model, MixerLM)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    expected, found = theirs(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    written = [of.generate(ids, attention_mask=mask, **GREEDY) for of in (model, theirs)]
    assert torch.equal(*written)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert load_model(tmp_path, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def hybrid() -> Any:
    """Linear layers around one of attention."""
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return shaken(hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**SIZES, **experts)))


@torch.no_grad()
@pytest.mark.parametrize("make", [hybrid, lambda: shaken(hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)))])
@pytest.mark.parametrize("layers", [None, [-1]])
def test_in_the_place_of_linear_layers(make: Callable[[], Any], layers: list[int] | None) -> None:
    """The model computes and writes what it did, in one pass, token by token, with beams and beside padding."""
    theirs, ids, mask = make(), torch.randint(1, 40, (2, 12)), padding(2, 12)
    model = deepcopy(theirs)
    put = replace_linear_layers(model, layers)
    assert len(put) == (2 if layers is None else 1)
    real = mask.bool()
    expected, found = (of(ids, attention_mask=mask).logits[real] for of in (theirs, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    for choices in ({}, {"num_beams": 2}, {"use_cache": False}):
        written = [of.generate(ids, attention_mask=mask, **GREEDY, **choices) for of in (theirs, model)]
        assert torch.equal(*written), choices
    with regard.watch(model, regard.Received(), layers="*.mixer") as seen:
        model(ids)
    assert len(seen.layers) == len(put)


@torch.no_grad()
def test_a_cache_that_another_layer_began() -> None:
    model, ids = hybrid(), torch.randint(1, 40, (1, 5))
    cache = model(ids).past_key_values
    replace_linear_layers(model)
    with pytest.raises(ValueError, match="layer 0 of the cache holds what another layer kept of a text"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="takes padded texts, and was given packed ones"):
        model.model.layers[0].linear_attn(torch.randn(1, 5, WIDTH), cu_seq_lens_q=torch.tensor([0, 5]))
