"""Calls under rules are seen and steered as others are: those of `regard.attention`, and those that an edit restricts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import regard
from regard import masks
from regard.cache import SnapKV

RULE = (masks.window(left=3, right=0) | masks.keys([0])) & masks.causal()


class Ruled(nn.Module):
    """One layer of grouped heads whose attention goes by a rule, or by its matrix."""

    def __init__(self, by_rule: bool) -> None:
        super().__init__()
        self.by_rule = by_rule
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(16, size, generator=generator) / 4 for size in (32, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            (x @ weight).unflatten(-1, (heads, 8)).transpose(1, 2)
            for weight, heads in zip(self.weights, (4, 2, 2), strict=True)
        )
        more: dict[str, Any] = {"softcap": 5.0, "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0])}
        if self.by_rule:
            return regard.attention(query, key, value, mask=RULE, enable_gqa=True, **more)
        visible = RULE.dense(len(x), 4, x.shape[1], x.shape[1])
        return regard.attention(query, key, value, attn_mask=visible, enable_gqa=True, **more)


EDITS = (
    regard.Reweight(keys=[2, 5], by=3.0),
    regard.Block(keys=[4], heads=[1]),
    regard.Temperature(0.5, heads=[2]),
    regard.Restrict(masks.window(1, 0), heads=[0, 3]),
    regard.AddToOutput(torch.arange(8.0), heads=[1]),
)


@pytest.mark.parametrize("tokens", [7, 30])
def test_a_rule_is_seen_and_steered_as_its_matrix_is(tokens: int) -> None:
    x = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1))
    runs = []
    for by_rule in (True, False):
        model = Ruled(by_rule)
        with torch.no_grad(), regard.watch(model, regard.Entropy(), regard.Received(), regard.Mass({"a": [0]})) as seen:
            plain = model(x)
            with regard.steer(model, *EDITS):
                steered = model(x)
        assert float((steered - plain).abs().max()) > 0.1
        data = seen.dataset()
        runs.append(
            (plain, steered, *(torch.from_numpy(data[name].values) for name in ("entropy", "received", "mass")))
        )
    for by_rule_, by_matrix in zip(*runs, strict=True):
        torch.testing.assert_close(by_rule_, by_matrix, atol=2e-5, rtol=1e-5)


def test_a_rule_keeps_its_gradients_while_it_is_watched() -> None:
    model, x = Ruled(by_rule=True), torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    alone = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with regard.watch(model, regard.Entropy()):
        watched = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for gradient, other in zip(watched, alone, strict=True):
        torch.testing.assert_close(gradient, other)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


def test_a_restricted_model_decodes_as_it_reads() -> None:
    """Rules are on positions in the text, in a step of decoding too."""
    model, ids = llama(), torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), regard.steer(model, regard.Restrict(masks.window(left=5, right=0) | masks.keys([0]))):
        written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, output_logits=True,
                                 return_dict_in_generate=True)  # fmt: skip
        read = model(written.sequences).logits[:, 19:-1]
    torch.testing.assert_close(torch.stack(written.logits, dim=1), read, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert float((model(written.sequences).logits[:, 19:-1] - read).abs().max()) > 1e-3


def by_rule(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' models take it by name."""
    rule = (masks.window(left=5, right=0) | masks.keys([0])).offset(query_start=key.shape[2] - query.shape[2])
    output = regard.attention(
        query, key, value, mask=rule & masks.causal().offset(query_start=key.shape[2] - query.shape[2]),
        scale=more["scaling"], enable_gqa=True,
    )  # fmt: skip
    return output.transpose(1, 2), None


def test_a_model_of_transformers_that_attends_by_a_rule() -> None:
    """It is the same model as the one that an edit restricts; its cache is not compressed."""
    AttentionInterface.register("by_rule", by_rule)
    ids = torch.randint(1, 50, (1, 20), generator=torch.Generator().manual_seed(2))
    model = llama()
    with torch.no_grad(), regard.steer(model, regard.Restrict(masks.window(left=5, right=0) | masks.keys([0]))):
        restricted = model(ids).logits
    model.set_attn_implementation("by_rule")
    with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
        torch.testing.assert_close(model(ids).logits, restricted, atol=1e-5, rtol=1e-5)
    assert seen.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    compressed = regard.compress(model, SnapKV(0.5, window=4))
    with pytest.raises(NotImplementedError, match="attends under a rule"), torch.no_grad(), compressed:
        model(ids)


def test_a_rule_has_no_keys_of_another_run() -> None:
    q = torch.randn(1, 2, 6, 8)
    with regard.capture(None) as other:
        scaled_dot_product_attention(q, q, q)
    edits = (regard.Restrict(masks.window(1, 0)), regard.Mutual(other, beside=True))
    with pytest.raises(ValueError, match="knows no keys of another run"), regard.steer(None, *edits):
        scaled_dot_product_attention(q, q, q)


def test_what_restrict_is_not_given() -> None:
    with pytest.raises(TypeError, match=r"Restrict takes a rule of regard\.masks"):
        regard.Restrict(torch.ones(3, 3, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents"), regard.steer(None, regard.Restrict(masks.documents([4, 4]))):
        scaled_dot_product_attention(*torch.randn(3, 1, 1, 12, 8))
