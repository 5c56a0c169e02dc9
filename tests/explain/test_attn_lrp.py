"""Relevance by changed gradients against relevance handed down layer by layer, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import regard
from regard.explain import AttnLRP, faithfulness

close = torch.testing.assert_close
SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
IDS = torch.tensor([[3, 9, 27, 5, 14, 33], [7, 7, 1, 30, 2, 8]])


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, **more)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def through_linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """From the relevance of ``x Wᵀ`` to that of x."""
    return x * ((relevance / (x @ weight.T)) @ weight)


def through_product(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """From the relevance of a product of two variables to that of each."""
    share = relevance / (2 * (left @ right))
    return left * (share @ right.mT), right * (left.mT @ share)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return x * cos + half * sin


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By the transposed matrix."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([(x * sin)[..., half:], -(x * sin)[..., :half]], dim=-1)


def by_hand(model: LlamaForCausalLM, ids: Tensor, answer: int) -> tuple[Tensor, Tensor]:
    """The logit of the answer at the end, and the relevance of each token, through every layer explicitly."""
    body = model.model
    x = body.embed_tokens(ids)
    cos, sin = (part[:, None] for part in body.rotary_emb(x, torch.arange(ids.shape[1])[None]))
    tokens = ids.shape[1]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    tape: list[Any] = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = layer.input_layernorm(x)
        q, k, v = (
            proj(normed).unflatten(-1, (-1, 4)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned_q, turned_k = (
            rotated(q, cos, sin),
            rotated(k, cos, sin).repeat_interleave(2, 1),
        )  # two heads share a key head
        wide_v = v.repeat_interleave(2, 1)
        logits = attention.scaling * turned_q @ turned_k.mT
        matrix = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        output = matrix @ wide_v
        mixed = output.transpose(1, 2).flatten(2)
        middle = x + attention.o_proj(mixed)
        normed_middle = layer.post_attention_layernorm(middle)
        gate, up = mlp.gate_proj(normed_middle), mlp.up_proj(normed_middle)
        inner = torch.nn.functional.silu(gate) * up
        after = middle + mlp.down_proj(inner)
        tape.append(
            (layer, x, normed, turned_q, turned_k, wide_v, logits, matrix, mixed, middle, normed_middle, inner, after)
        )
        x = after
    final = body.norm(x)
    metric = final[:, -1] @ model.lm_head.weight[answer]
    relevance = torch.zeros_like(x)
    relevance[:, -1] = final[:, -1] * model.lm_head.weight[answer]  # the norm hands its relevance on as it is
    for (
        layer,
        x,
        normed,
        turned_q,
        turned_k,
        wide_v,
        logits,
        matrix,
        mixed,
        middle,
        normed_middle,
        inner,
        after,
    ) in tape[::-1]:
        attention, mlp = layer.self_attn, layer.mlp
        of_mlp = relevance * (after - middle) / after
        of_inner = through_linear(inner, mlp.down_proj.weight, of_mlp)
        to_middle = through_linear(normed_middle, mlp.gate_proj.weight, of_inner / 2)
        to_middle = to_middle + through_linear(normed_middle, mlp.up_proj.weight, of_inner / 2)
        relevance = relevance * middle / after + to_middle
        of_attention = relevance * (middle - x) / middle
        of_mixed = through_linear(mixed, attention.o_proj.weight, of_attention)
        of_output = of_mixed.unflatten(-1, (4, 4)).transpose(1, 2)
        of_matrix, of_values = through_product(matrix, wide_v, of_output)
        of_logits = logits * (of_matrix - matrix * of_matrix.sum(-1, keepdim=True))
        of_logits = of_logits.masked_fill(hidden, 0.0)
        of_q, of_k = through_product(turned_q, turned_k.mT, of_logits)
        parts = [
            (attention.q_proj, unrotated(of_q / turned_q, cos, sin)),
            (attention.k_proj, unrotated(of_k.mT / turned_k, cos, sin).unflatten(1, (2, 2)).sum(2)),
            (attention.v_proj, (of_values / wide_v).unflatten(1, (2, 2)).sum(2)),
        ]
        to_x = sum(normed * (share.transpose(1, 2).flatten(2) @ proj.weight) for proj, share in parts)
        relevance = relevance * x / middle + to_x
    return metric, relevance.sum(-1)


def test_rules_of_a_llama() -> None:
    model = llama()
    with torch.no_grad():
        metric, wanted = by_hand(model, IDS, 11)
        close(model(IDS).logits[:, -1, 11], metric)
    found = AttnLRP().explain(model, {"input_ids": IDS}, lambda output: output.logits[:, -1, 11])
    close(found, wanted)


def test_a_norm_is_a_multiplication_by_a_constant() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = torch.nn.Embedding(40, 8), torch.nn.LayerNorm(8)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.embedding(ids))
            return x + 0 * self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = Normed().double().eval()
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
        x = model.embedding(IDS)
        constant = model.norm.weight / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    found = AttnLRP().explain(model, IDS, lambda output: output[..., 3].sum(1))
    close(found, (constant[..., 3] * (x[..., 3] - x.mean(-1))).detach())


def test_the_model_says_what_it_says_and_is_left_as_it_was() -> None:
    model, said = llama(), []

    def metric(output: Any) -> Tensor:
        said.append(output.logits.detach())
        return output.logits[:, -1, 11]

    with torch.no_grad():
        plain = model(IDS).logits
        found = AttnLRP().explain(model.requires_grad_(False), {"input_ids": IDS}, metric)
    close(said[0], plain)
    with pytest.raises(ValueError, match="one number for each text"):
        AttnLRP().explain(model, {"input_ids": IDS}, lambda output: output.logits)
    assert not [module for module in model.modules() if module._forward_hooks]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain)
    close(AttnLRP().explain(model.requires_grad_(), {"input_ids": IDS}, metric), found)


def test_truer_than_chance_on_a_model_with_biases() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    ids = torch.randint(0, 40, (32, 12))
    metric = regard.logit_difference(3, 4)
    relevance = AttnLRP().explain(model, {"input_ids": ids}, metric)
    truth = faithfulness(model, {"input_ids": ids}, relevance, metric, steps=6)
    chance = faithfulness(model, {"input_ids": ids}, torch.rand(32, 12), metric, steps=6)
    better = truth.comprehensiveness - chance.comprehensiveness
    assert better.mean() > 2 * better.std() / 32**0.5


def test_what_is_refused() -> None:
    phi = Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0)).eval()
    metric = regard.logit_difference(3, 4)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp has both factors of its gate in one projection"):
        AttnLRP().explain(phi, {"input_ids": IDS}, metric)
    with pytest.raises(ValueError, match="this explanation needs a metric"):
        AttnLRP().explain(phi, {"input_ids": IDS})
    with pytest.raises(ValueError, match=r"Linear does not tell its embeddings by get_input_embeddings\(\)"):
        AttnLRP().explain(torch.nn.Linear(2, 2), torch.zeros(1, 2), metric)
