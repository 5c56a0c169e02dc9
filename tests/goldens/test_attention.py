"""The maps of attention as transformers computes it, in its own eager code, with the model's own queries and keys."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from regard import AttentionMap
from tests.goldens.recorded import Recorded, recorded

IDS = torch.arange(3, 22)[None].repeat(2, 1) * torch.tensor([[1], [2]])
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 48, "pad_token_id": 0,
}  # fmt: skip


def map_of(call: Recorded, sinks: Tensor | None = None) -> AttentionMap:
    return AttentionMap(call.query, call.key, call.mask, scale=call.scale, sinks=sinks, enable_gqa=True)


def test_latent_attention_of_deepseek_v3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of a latent and a rotary part, wider than the values."""
    config = hf.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    calls = recorded(hf.DeepseekV3Model(config).eval(), IDS, monkeypatch)
    assert len(calls) == 2
    for call in calls:
        attention = map_of(call)
        assert call.query.shape[-1] == 12
        torch.testing.assert_close(attention.dense(), call.matrix)
        torch.testing.assert_close((attention @ call.value).transpose(1, 2), call.output)


def test_sinks_of_gpt_oss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learned logit for each head takes its part of every row; one layer of two has a window."""
    config = hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6)
    model = hf.GptOssModel(config).eval()
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    for call in recorded(model, IDS, monkeypatch):
        attention = map_of(call, call.module.get_parameter("sinks").detach())
        assert float(call.matrix.sum(-1).max()) < 1
        torch.testing.assert_close(attention.dense(), call.matrix)
        torch.testing.assert_close((attention @ call.value).transpose(1, 2), call.output)
        torch.testing.assert_close(attention.received(), call.matrix.sum(2))


def test_differential_attention_of_diffllama(monkeypatch: pytest.MonkeyPatch) -> None:
    """``(P_1 − λ P_2) V`` is one operator, of the first half of the heads and the second."""
    config = hf.DiffLlamaConfig(**SMALL | {"num_key_value_heads": 4})
    model = hf.DiffLlamaModel(config).eval()
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def keep(
        module: torch.nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], made: tuple[Tensor, ...]
    ) -> None:
        seen[module] = named["hidden_states"] if "hidden_states" in named else given[0], made[0]

    for layer in model.layers:
        layer.self_attn.register_forward_hook(keep, with_kwargs=True)
    calls = {call.module: call for call in recorded(model, IDS, monkeypatch)}
    assert len(calls) == 2
    for of, (x, expected) in seen.items():
        both = map_of(calls[of])
        with torch.no_grad():
            strength = float((of.lambda_q1 @ of.lambda_k1).exp() - (of.lambda_q2 @ of.lambda_k2).exp() + of.lambda_init)
            attention = both.heads([0, 1]) - strength * both.heads([2, 3])
            values = of.v_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
            wide = torch.cat([values[:, :2], values[:, 2:]], dim=-1)  # the two halves of the value heads, side by side
            mixed = (1 - of.lambda_init) * of.groupnorm((attention @ wide).transpose(1, 2))
            torch.testing.assert_close(of.o_proj(mixed.flatten(2)), expected)
