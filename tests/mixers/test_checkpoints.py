"""What is wrong with a checkpoint is named; what is right is loaded in `tests/goldens`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

from regard.mixers import GatedLinearAttention, load_layer, load_model, replace_linear_layers

GLA: dict[str, Any] = {"model_type": "gla", "hidden_size": 16, "num_heads": 2, "norm_eps": 1e-5}
MAMBA: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20, "state_size": 4}


def gla() -> dict[str, Tensor]:
    """The weights of a layer, named as flash-linear-attention names them."""
    weights = GatedLinearAttention(16, 2).state_dict()
    return {("g_norm_swish_gate.weight" if name == "norm.weight" else name): weights[name] for name in weights}


def test_weights_are_copies_of_the_dtype_asked_for() -> None:
    weights = gla()
    mixer = load_layer(weights, GLA, torch.bfloat16)
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.bfloat16}
    same = load_layer(weights, GLA)
    with torch.no_grad():
        same.get_parameter("q_proj.weight").zero_()
    assert weights["q_proj.weight"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "rwkv7"},
            "layers of 'rwkv7' are not known as mixers; known are delta_net, gated_deltanet, gla, ",
        ),
        ({"model_type": None}, "layers of 'None' are not known"),
        ({"norm_eps": ...}, "the configuration of gla does not say norm_eps"),
        ({"feature_map": "relu"}, "gla is known with feature_map = None alone, and has feature_map = 'relu'"),
        ({"hidden_act": "powlu"}, "gla is known with hidden_act = 'swish' alone"),
        ({"sharper": True, "wider": 2}, "gla has options that are not known here: sharper, wider"),
        ({"num_kv_heads": 3}, "GatedLinearAttention: heads must be a multiple of num_kv_heads, got 2 and 3"),
        ({"use_short_conv": True}, "of gla has them, lack k_conv1d.weight, q_conv1d.weight, v_conv1d.weight"),
        ({"use_output_gate": False}, "of gla has them, have beside theirs g_proj.weight"),
        (
            {"expand_k": 1.0},
            r"q_proj.weight \(8, 16\): the configuration of gla makes q_proj.weight of shape \(16, 16\)",
        ),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (GLA | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        load_layer(gla(), config)


def test_options_that_are_unset_need_not_be_known() -> None:
    load_layer(gla(), GLA | {"sharper": False, "wider": None, "fuse_norm": True, "transformers_version": "4.40"})


def test_a_split_weight_of_another_shape() -> None:
    config = {
        "model_type": "qwen3_next", "hidden_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    weights = {
        "in_proj_qkvz.weight": torch.zeros(47, 16), "in_proj_ba.weight": torch.zeros(8, 16), "A_log": torch.zeros(4),
        "dt_bias": torch.zeros(4), "conv1d.weight": torch.zeros(32, 1, 4), "norm.weight": torch.zeros(4),
        "out_proj.weight": torch.zeros(16, 16),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"in_proj_qkvz.weight \(47, 16\): .* makes [qkvg]_proj.weight of shape"):
        load_layer(weights, config)
    assert load_layer(weights | {"in_proj_qkvz.weight": torch.zeros(48, 16)}, config).dim == 16


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json, or no weights in \*.safetensors"):
        load_model(tmp_path)
    theirs = MambaForCausalLM(MambaConfig(**MAMBA))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    fewer = {name: tensor for name, tensor in weights.items() if name != "backbone.layers.1.mixer.D"}
    save_file(fewer, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of mamba has them, lack backbone.layers.1.mixer.D$"):
        load_model(tmp_path)
    save_file(weights | {"backbone.gate": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of mamba has them, have beside theirs backbone.gate$"):
        load_model(tmp_path)
    for change, message in (
        (
            {"model_type": "qwen3_next"},
            "a model of qwen3_next is not made of linear layers alone: .*replace_linear_layers",
        ),
        (GLA | {"attn": {"layers": [1]}, "hidden_act": "swish"}, "gla is known with attn = None alone"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_weights_in_several_files(tmp_path: Path) -> None:
    theirs = MambaForCausalLM(MambaConfig(**MAMBA)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_models_without_linear_layers() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    with pytest.raises(ValueError, match=r"a LlamaForCausalLM \(llama\) has no linear layers that are known"):
        replace_linear_layers(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)))
    with pytest.raises(IndexError, match="layer 7 was chosen"):
        replace_linear_layers(MambaForCausalLM(MambaConfig(**MAMBA)), [7])


def test_a_module_and_its_weights_are_the_same() -> None:
    theirs, x = MambaMixer(MambaConfig(**MAMBA), layer_idx=0), torch.randn(1, 5, 16)
    one, other = (load_layer(layer, MambaConfig(**MAMBA)) for layer in (theirs, theirs.state_dict()))
    assert torch.equal(one(x)[0], other(x)[0])
