"""Models whose attention is not one call on the keys of its own layer's cache."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import Knorm, Policy, QAdA, SnapKV, StreamingLLM
from tests.cache.conftest import texts, watched_as_unwatched

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
LATENT = SIZES | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = LATENT | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                    "moe_intermediate_size": 16, "first_k_dense_replace": 1}  # fmt: skip
SHARING = SIZES | {"num_hidden_layers": 6, "head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97,
                   "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 64,
                   "hidden_size_per_layer_input": 8}  # fmt: skip
GEMMA3N = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6}

LATENTS = {
    "deepseek v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**EXPERTS)),
    "deepseek v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**EXPERTS)),
    "of one width": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**EXPERTS | {"v_head_dim": 8})),
    "minicpm3": lambda: hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**LATENT)),
}
SHARED = {
    "gemma3n": lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**SHARING, **GEMMA3N)),
    "gemma4": lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**SHARING, global_head_dim=8)),
}
LENDERS = {5: 3}  # the layer whose keys another attends to; those with a window are left alone


def model_of(make: Any) -> Any:
    """A random model with attention far from uniform."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "attn" in name:
                parameter.mul_(4)
    return model


def masked(model: Any, ids: Tensor, mask: Tensor, prompt: int, left: dict[int, Tensor]) -> Tensor:
    """Logits of the whole text, in which steps after the prompt see what is ``left`` of it, by layer and key head."""

    def hide(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        kept = left.get(LENDERS.get(call.place.layer, call.place.layer))
        if kept is None:
            return call
        tokens = call.query.shape[2]
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None].bool()
        visible = visible.expand(-1, call.query.shape[1], -1, -1).clone()
        shared = call.query.shape[1] // kept.shape[1]
        visible[:, :, prompt:, :prompt] &= kept[:, :, None, :prompt].repeat_interleave(shared, 1)
        return regard.AttentionCall(call.query, call.key, call.value, visible, scale=call.scale, enable_gqa=True)

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.steer(model, regard.Custom(hide)):
        logits: Tensor = model(ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, prompt:]


def compressed(model: Any, ids: Tensor, mask: Tensor, prompt: int, policy: Policy) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of steps after a prompt, and what is left of that, by layer."""
    positions, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad(), regard.compress(model, policy) as cache:
        past = model(
            ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=positions[:, :prompt]
        ).past_key_values
        left = {layer.layer: layer.positions for layer in cache.report().layers if not layer.window}
        for end in range(prompt + 1, ids.shape[1] + 1):
            step = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=past,
                         position_ids=positions[:, end - 1 : end])  # fmt: skip
            logits.append(step.logits[:, -1])
    return torch.stack(logits, dim=1), left


@pytest.mark.parametrize("lengths", [(20,), (20, 11)], ids=["one", "padded"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*LATENTS, *SHARED])
def test_steps_attend_to_what_is_left(name: str, implementation: str, lengths: tuple[int, ...]) -> None:
    model, inputs = model_of((LATENTS | SHARED)[name]), texts(*lengths)
    model.set_attn_implementation(implementation)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits, left = compressed(model, ids, mask, 16, Knorm(budget=4))
    assert all((kept[..., :16].sum(-1) == 4).all() for kept in left.values())
    torch.testing.assert_close(logits, masked(model, ids, mask, 16, left), atol=2e-4, rtol=1e-3)
    # and what is dropped does matter
    everything = {layer: torch.ones_like(kept) for layer, kept in left.items()}
    assert (logits - masked(model, ids, mask, 16, everything)).abs().max() > 1e-3


@pytest.mark.parametrize("policy", [StreamingLLM(budget=6, sinks=2), SnapKV(budget=6, window=2, kernel=3)], ids=str)
@pytest.mark.parametrize("name", [*LATENTS, *SHARED])
def test_generation_watched_is_as_unwatched(name: str, policy: Policy) -> None:
    watched_as_unwatched(model_of((LATENTS | SHARED)[name]), texts(12, 7), policy)


@pytest.mark.parametrize("name", SHARED)
def test_a_layer_that_borrows_sees_what_its_lender_saw(name: str) -> None:
    """Of StreamingLLM, which drops an entry after each step: the step itself sees it, in both layers."""
    model, ids = model_of(SHARED[name]), texts(14)["input_ids"]
    with torch.no_grad(), regard.compress(model, StreamingLLM(budget=6, sinks=2)):
        past = model(ids[:, :10]).past_key_values
        with regard.watch(model, regard.Rows([12])) as seen:
            for end in (11, 12, 13):
                model(ids[:, end - 1 : end], past_key_values=past)
    rows = torch.as_tensor(seen.dataset().rows.fillna(0).values).flatten(3, -2)  # (layer, batch, head, …, key)
    for layer in (1, 3, 5):
        found = {tuple(row.nonzero()[:, 0].tolist()) for row in rows[layer].flatten(0, -2)}
        assert found == {(0, 1, 8, 9, 10, 11, 12)}, layer


@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_far_tokens_left_unread(name: str) -> None:
    """A head that is local for every query attends to its local entries; for none, to all, as without a policy."""
    model, inputs = model_of(LATENTS[name]), texts(12)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = torch.stack(model.generate(**inputs, **options).logits)
    logits = {}
    for threshold in (0.0, 1.0):
        with regard.compress(model, QAdA(threshold=threshold, sinks=1, recent=3)):
            logits[threshold] = torch.stack(model.generate(**inputs, **options).logits)
    torch.testing.assert_close(logits[1.0], plain, atol=1e-4, rtol=1e-3)
    assert (logits[0.0] - plain).abs().max() > 1e-3


def test_a_latent_entry_has_the_keys_of_all_heads() -> None:
    model, ids = model_of(LATENTS["deepseek v3"]), texts(12)["input_ids"]
    found: list[regard.AttentionCall] = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        found.append(call)
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        model(ids)
    with torch.no_grad(), regard.compress(model, Knorm(budget=5)) as cache:
        model(ids)
    for call, layer in zip(found, cache.report().layers, strict=True):
        norm = call.key.square().sum(dim=(1, 3)).sqrt()
        assert layer.positions[0, 0].nonzero()[:, 0].tolist() == sorted(norm[0].argsort()[:5].tolist())
        assert layer.bytes == 5 * (16 + 8) * 4


def test_keys_that_are_laid_out_anew_are_refused_before_the_first_token() -> None:
    """JetMoe repeats its key heads in another order than query heads have that share them."""
    config = hf.JetMoeConfig(**SIZES | {"num_key_value_heads": 2, "kv_channels": 8}, num_local_experts=4)
    model = hf.JetMoeForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"changes the keys that its cache returns"), torch.no_grad(), \
            regard.compress(model, Knorm(budget=0.5)):  # fmt: skip
        model(**texts(12))


def test_two_calls_a_layer_are_refused_before_the_first_token() -> None:
    model, steps = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**SIZES)).eval(), list[int]()
    stop = hf.StoppingCriteriaList([lambda ids, scores, **options: steps.append(1) or torch.zeros(1, dtype=torch.bool)])
    with pytest.raises(RuntimeError, match=r"several calls of attention on one layer"), \
            regard.compress(model, Knorm(budget=0.5)):  # fmt: skip
        model.generate(**texts(12), stopping_criteria=stop)
    assert not steps
