"""Mixers against the same mechanisms in transformers, with the same weights."""

import math

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from regard.mixers import GatedDeltaRule, SelectiveSSM, delta_rule, lightning_attention, lightning_decay
from regard.mixers.forms import Form

FORMS: tuple[Form, ...] = ("parallel", "chunked", "recurrent")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [True, False])
def test_gated_delta_rule_of_qwen3_next(form: Form, whole: bool) -> None:
    """Its operator, all at once and from a state; it takes tokens before heads, and scales queries itself."""
    query, key, value = torch.randn(3, 2, 70, 3, 16).unbind()
    beta, decay = torch.rand(2, 70, 3), -functional.softplus(torch.randn(2, 70, 3))
    theirs = qwen3_next.torch_chunk_gated_delta_rule if whole else qwen3_next.torch_recurrent_gated_delta_rule
    before = torch.randn(2, 3, 16, 16)
    expected, expected_state = theirs(
        query, key, value, g=decay, beta=beta, initial_state=before, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    q, k = functional.normalize(q, dim=-1) / math.sqrt(16), functional.normalize(k, dim=-1)
    found, state = delta_rule(q, k, v, beta.mT, before, log_decay=decay.mT, form=form)
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=1e-4)


def test_selective_ssm_is_the_mixer_of_mamba() -> None:
    config = hf.MambaConfig(hidden_size=24, state_size=5, expand=2, conv_kernel=4, time_step_rank=3)
    theirs = MambaMixer(config, layer_idx=0).eval()
    ours = SelectiveSSM(24, state_size=5, expand=2, time_step_rank=3, conv_kernel=4).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 40, 24)
        torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_lightning_attention_of_minimax(form: Form) -> None:
    """Its layer, with its own norm and gate around our operator, and its decays."""
    config = hf.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_hidden_layers=4, block_size=16,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    theirs, x = MiniMaxLightningAttention(config, layer_idx=1).eval(), torch.randn(2, 37, 32)
    with torch.no_grad():
        expected, expected_state = theirs(x, (x, x), None)
        projected = functional.silu(theirs.qkv_proj(x)).unflatten(-1, (4, 24)).transpose(1, 2)
        query, key, value = projected.split(8, dim=-1)
        decay = lightning_decay(4, layer=1, layers=4)
        torch.testing.assert_close(decay, torch.exp(-theirs.slope_rate.flatten()), atol=1e-5, rtol=0.0)
        mixed, state = lightning_attention(query, key, value, decay, form=form, chunk=16)
        found: Tensor = theirs.out_proj(theirs.output_gate(x).sigmoid() * theirs.norm(mixed.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_gated_delta_rule_is_the_layer_of_qwen3_next() -> None:
    """The whole layer, as it is initialised: small queries beside the norm's epsilon, which weigh there."""
    config = hf.Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, rms_norm_eps=1e-5, hidden_act="silu",
    )  # fmt: skip
    theirs, ours = qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0).eval(), GatedDeltaRule(32, heads=4).eval()
    with torch.no_grad():
        mine = dict(ours.named_parameters())
        query, key, value = (mine[f"{name}_proj.weight"].unflatten(0, (4, 8)) for name in "qkv")
        gate = mine["g_proj.weight"].unflatten(0, (4, 8))
        theirs.in_proj_qkvz.weight.copy_(torch.cat([query, key, value, gate], dim=1).flatten(0, 1))
        theirs.in_proj_ba.weight.copy_(torch.stack([mine["b_proj.weight"], mine["a_proj.weight"]], dim=1).flatten(0, 1))
        theirs.conv1d.weight.copy_(mine["conv1d.weight"])
        theirs.A_log.copy_(mine["A_log"])
        theirs.dt_bias.copy_(mine["dt_bias"])
        theirs.norm.weight.copy_(mine["norm.weight"])
        theirs.out_proj.weight.copy_(mine["o_proj.weight"])
        x = 0.1 * torch.randn(2, 70, 32)
        torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-6, rtol=1e-4)
