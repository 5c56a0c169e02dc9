"""Attention behind transformers' eager function is seen, steered and compressed exactly, with soft caps, sinks and biases."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import Module

import regard
from regard.cache import KeepAll, SnapKV, StreamingLLM
from regard.steer import Edit
from tests.runtime.models import (
    EDITS,
    TEXT,
    check_seen,
    check_steered,
    edited_matrix,
    first_output,
    gemma2,
    gpt_oss,
    inputs_of,
    t5,
    widened,
)

MODELS = [gemma2, gpt_oss, t5]


def modeling(model: Module) -> Any:
    return sys.modules[type(model).__module__]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_seen_as_the_model_returns_it(make: Callable[[], Module], padded: bool) -> None:
    check_seen(make(), padded)


def test_the_function_is_replaced_in_the_block_alone() -> None:
    model = gemma2()
    before = modeling(model).eager_attention_forward
    with regard.watch(model, regard.Received()):
        assert modeling(model).eager_attention_forward is not before
        first_output(model, inputs_of(model))
    assert modeling(model).eager_attention_forward is before


def test_keys_that_the_mask_hides_are_seen_by_no_query() -> None:
    model = gemma2()
    with torch.no_grad(), regard.watch(model, regard.Sinks(), layers=1, keep_maps=True) as seen:
        model(**inputs_of(model))
    assert seen.maps[seen.layers[0]][0].viewers()[0, 0].tolist() == [*range(12, 0, -1)]


def edited_eager(edits: Sequence[Edit]) -> Callable[..., Any]:
    """What edits mean, written out on the stored matrix in float64."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, softcap: float | None = None, position_bias: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
        logits = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + position_bias
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask < -1e30, -torch.inf)
        sinks = getattr(module, "sinks", None)
        sinks = None if sinks is None else sinks.detach().double()[None, :, None, None].expand(*logits.shape[:3], 1)
        matrix = edited_matrix(logits, edits, sinks)
        return (matrix @ value).transpose(1, 2).to(query.dtype), matrix.to(query.dtype)

    return forward


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("edits", EDITS, ids=str)
def test_steered_as_the_stored_matrix_is(
    make: Callable[[], Module], edits: Sequence[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = make(), edited_eager(edits)
    check_steered(model, edits, lambda: monkeypatch.setattr(modeling(model), "eager_attention_forward", eager))


@pytest.mark.parametrize("make", MODELS)
def test_weights_returned_are_the_edited_ones(make: Callable[[], Module]) -> None:
    model = make()
    with torch.no_grad(), regard.steer(model, regard.Block(keys=[4], queries=slice(5, None))):
        weights = model(**inputs_of(model), output_attentions=True).attentions
    assert all(float(matrix[:, :, 5:, 4].abs().max()) == 0 for matrix in weights)


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_gradients_go_through_edits(make: Callable[[], Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    inputs, edits = inputs_of(model), [regard.Reweight(keys=[5], by=4), regard.Temperature(0.7)]
    parameters = [p for name, p in model.named_parameters() if "q_proj.weight" in name or "sinks" in name]
    with regard.steer(model, *edits):
        got = torch.autograd.grad(model(**inputs)[0].square().mean(), parameters)
    plain = modeling(model).eager_attention_forward

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        bias = torch.zeros_like(attention_mask[..., :1, :])
        bias[..., 5] = torch.log(torch.tensor(4.0))
        module_sinks = getattr(module, "sinks", None)
        if module_sinks is None:
            named["scaling"], named["softcap"] = named["scaling"] / 0.7, named["softcap"] / 0.7
            return plain(module, query, key, value, (attention_mask + bias) / 0.7, **named)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        logits = query @ key.mT * named["scaling"] + attention_mask + bias
        sinks = module_sinks[None, :, None, None].expand(*logits.shape[:3], 1)
        matrix = torch.softmax(torch.cat([logits, sinks], -1) / 0.7, -1)[..., :-1]
        return (matrix @ value).transpose(1, 2), matrix

    monkeypatch.setattr(modeling(model), "eager_attention_forward", forward)
    wanted = torch.autograd.grad(model(**inputs)[0].square().mean(), parameters)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
def test_generate_is_watched_and_compressed(make: Callable[[], Module]) -> None:
    model: Any = make()
    inputs, options = inputs_of(model), {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with regard.watch(model, regard.Mass({"first": [0]})) as seen:
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert seen.dataset().mass.sizes["query"] == 15
    with regard.compress(model, KeepAll()):
        assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("make", [gemma2, gpt_oss])
@pytest.mark.parametrize("policy", [SnapKV(budget=6, window=2), StreamingLLM(6)], ids=str)
def test_compressed_alone_and_beside_a_watch(make: Callable[[], Module], policy: Any) -> None:
    model: Any = make()
    inputs = {"input_ids": inputs_of(model)["input_ids"][:1]}
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with regard.compress(model, policy) as kept:
        alone = model.generate(**inputs, **options)
    with regard.compress(model, policy), regard.watch(model, regard.Received()):
        beside = model.generate(**inputs, **options)
    assert "6" in str(kept.report())
    torch.testing.assert_close(torch.stack(alone.logits), torch.stack(beside.logits), atol=1e-4, rtol=1e-4)


IMAGE = 90


def llava(text: str) -> Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    config = hf.LlamaConfig(**TEXT) if text == "llama" else hf.Gemma2Config(**TEXT, query_pre_attn_scalar=8)
    return widened(
        hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(vision_config=vision, text_config=config, image_token_index=IMAGE, vision_feature_layer=-1)
        )
    )


def seeing() -> dict[str, Tensor]:
    ids = torch.randint(3, 80, (1, 10), generator=torch.Generator().manual_seed(2))
    ids[:, 2:6] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


@pytest.mark.parametrize(("vision", "text"), [("eager", "sdpa"), ("sdpa", "eager"), ("eager", "eager")])
def test_mixed_implementations_are_seen_alike(vision: str, text: str) -> None:  # R4
    model: Any = llava("llama")
    with torch.no_grad(), regard.watch(model, regard.Received()) as before:
        model(**seeing())
    model.set_attn_implementation({"vision_config": vision, "text_config": text})
    with torch.no_grad(), regard.watch(model, regard.Received()) as seen:
        model(**seeing())
    assert len(seen.layers) == 4
    assert seen.layers == before.layers
    torch.testing.assert_close(
        torch.as_tensor(seen.dataset().received.values),
        torch.as_tensor(before.dataset().received.values),
        equal_nan=True,
    )


def test_a_gate_reaches_both_towers_of_mixed_backends() -> None:  # S3
    model: Any = llava("gemma2")
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    with regard.steer(model, regard.Gate(0.0)):
        steered = first_output(model, seeing())
    for name, parameter in model.named_parameters():
        if "v_proj" in name:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(steered, first_output(model, seeing()), atol=1e-5, rtol=1e-5)
