"""Mixers against the same mechanisms in transformers, with the same weights."""

import math

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from regard.mixers import delta_rule, lightning_attention, lightning_decay
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
