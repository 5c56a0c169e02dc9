"""A text that is generated is one text: its prompt and each step joined on one axis."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from tests.watch.test_models import GROUPED, built, ids, kind_of, set_attention

STEPS = 8


def stored(model: torch.nn.Module, attribute: str, **options: Any) -> Any:
    set_attention(model, "eager")
    options |= {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "return_dict_in_generate": True}
    output = model.generate(**options, output_attentions=True)
    set_attention(model, "sdpa")
    return output, getattr(output, attribute)


def generate(model: torch.nn.Module, *statistics: regard.Statistic, **options: Any) -> tuple[regard.Recording, Any]:
    token_mask = options.pop("token_mask", None)
    options |= {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "return_dict_in_generate": True}
    with regard.watch(model, *statistics, token_mask=token_mask) as seen:
        output = model.generate(**options)
    return seen, output


def joined(steps: Any, layer: int, start: int = 0) -> np.ndarray:
    """The stored matrices of a prompt and its steps as one, (batch, heads, queries, keys), aligned at their last keys."""
    parts = [step[layer].double().numpy() for step in steps]
    batch, heads, prompt, _ = parts[0].shape
    queries = prompt + len(parts) - 1
    matrix = np.zeros((batch, heads, queries, queries))
    matrix[:, :, :prompt, :prompt] = parts[0][..., :prompt]
    for row, part in enumerate(parts[1:], start=prompt):
        width = min(part.shape[-1], row + 1)
        matrix[:, :, row, row + 1 - width : row + 1] = part[:, :, 0, part.shape[-1] - width :]
    return matrix


def entropy(matrix: np.ndarray) -> np.ndarray:
    return -(matrix * np.log(np.maximum(matrix, 1e-300))).sum(-1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "qwen3"])
def test_prompt_and_steps_are_joined(name: str) -> None:
    model, prompt = built(name), ids(9)
    _, steps = stored(model, "attentions", input_ids=prompt, do_sample=False)
    seen, output = generate(
        model, regard.Entropy(), regard.Received(), regard.At("previous", "own"), regard.Pooled(4),
        input_ids=prompt, do_sample=False,
    )  # fmt: skip
    data = seen.dataset()
    assert "pass" not in data.dims
    assert data.sizes["query"] == 9 + STEPS - 1
    assert torch.equal(seen.token_ids, output.sequences[:, :-1])
    for layer in range(2):
        matrix = joined(steps, layer)
        here = data.isel(layer=layer)
        np.testing.assert_allclose(here.entropy, entropy(matrix), atol=2e-5)
        np.testing.assert_allclose(here.received, matrix.sum(2), atol=2e-5, rtol=2e-5)
        diagonal = np.diagonal(matrix, axis1=2, axis2=3)
        np.testing.assert_allclose(here["at"].sel(target="own"), diagonal, atol=1e-5)
        before = np.diagonal(matrix, offset=-1, axis1=2, axis2=3)
        np.testing.assert_allclose(here["at"].sel(target="previous")[:, :, 1:], before, atol=1e-5)
        assert np.isnan(here["at"].sel(target="previous")[:, :, 0]).all()
        blocks = np.add.reduceat(np.add.reduceat(matrix, range(0, 16, 4), axis=2), range(0, 16, 4), axis=3)
        np.testing.assert_allclose(here.pooled, blocks, atol=5e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padded_prompts(name: str) -> None:
    model, prompt = built(name), ids(9)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    _, steps = stored(model, "attentions", input_ids=prompt, attention_mask=mask, do_sample=False)
    seen, _ = generate(
        model,
        regard.Entropy(),
        regard.Received(),
        input_ids=prompt,
        attention_mask=mask,
        token_mask=mask,
        do_sample=False,
    )
    data = seen.dataset()
    assert data.sizes["head"] == 4  # transformers packs the heads of a group as tokens in masked decode steps
    for layer in range(2):
        matrix = joined(steps, layer)
        matrix[0, :, :4] = 0
        expected = entropy(matrix)
        expected[0, :, :4] = np.nan
        np.testing.assert_allclose(data.entropy.isel(layer=layer), expected, atol=2e-5)
        np.testing.assert_allclose(data.received.isel(layer=layer), matrix.sum(2), atol=2e-5)


@pytest.mark.parametrize("prompt", [[[3, 4, 5, 6, 7, 7]], [[3, 4, 5, 6, 7]]], ids=["longer", "as long"])
def test_one_word_again_in_a_sliding_window(prompt: list[list[int]]) -> None:
    # The first layer's values are the word's, wherever it stands; they were taken for keys that stay.
    torch.manual_seed(0)
    config = hf.MistralConfig(**GROUPED | {"num_key_value_heads": 4}, sliding_window=5)
    model, ids = hf.MistralForCausalLM(config).eval(), torch.tensor(prompt)
    torch.nn.init.eye_(model.model.layers[0].self_attn.v_proj.weight)  # no sums, whose last bits differ
    options: Any = {"do_sample": False, "prefix_allowed_tokens_fn": lambda *_: [7]}
    _, steps = stored(model, "attentions", input_ids=ids, **options)
    seen, _ = generate(model, regard.Received(), input_ids=ids, **options)
    for layer in range(2):
        received = joined(steps, layer).sum(2)
        np.testing.assert_allclose(seen.dataset().received.isel(layer=layer), received, atol=2e-5)


def of_different_heads() -> torch.nn.Module:
    """A Llama of 4 heads in its first layer and 8 in its second, as Laguna has them, on 2 key heads each."""
    model: Any = built("llama")
    config = hf.LlamaConfig(**GROUPED | {"num_attention_heads": 8}, attn_implementation="sdpa")
    other: Any = hf.LlamaForCausalLM(config).eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    return model


@pytest.mark.parametrize("tokens", [2, 4, 9])  # of the prompt: as many as a group has heads, or others
def test_layers_of_different_heads_and_padded_prompts(tokens: int) -> None:  # R11
    model, prompt = of_different_heads(), ids(tokens, batch=3)
    mask = (torch.arange(tokens) >= torch.tensor([tokens - 1, 0, tokens // 2])[:, None]).long()
    options = {"input_ids": prompt, "attention_mask": mask, "do_sample": False}
    plain = model.generate(**options, max_new_tokens=STEPS, min_new_tokens=STEPS)
    with regard.capture(model, maps=True) as captured:
        assert torch.equal(model.generate(**options, max_new_tokens=STEPS, min_new_tokens=STEPS), plain)
    statistics = (regard.Entropy(), regard.Received(), regard.Mass({"new": slice(tokens, None)}))
    seen, output = generate(model, *statistics, token_mask=mask, **options)
    assert torch.equal(output.sequences, plain)
    data = seen.dataset()
    assert data.entropy.shape == (2, 3, 8, tokens + STEPS - 1)
    model.model.layers[1].self_attn.config._attn_implementation = "eager"
    _, steps = stored(model, "attentions", **options)
    model.model.layers[1].self_attn.config._attn_implementation = "sdpa"
    for layer, heads in enumerate([4, 8]):
        path, here = seen.layers[layer], data.isel(layer=layer)
        calls = [captured.at(path, number).call for number in range(STEPS)]
        assert [call.query.shape[1:3] for call in calls if call] == [(heads, tokens), *[(heads, 1)] * (STEPS - 1)]
        matrix = joined(steps, layer)
        matrix[:, :, :tokens] *= mask.numpy()[:, None, :, None]
        expected = entropy(matrix)
        expected[:, :, :tokens][(mask.numpy() == 0)[:, None].repeat(heads, 1)] = np.nan
        np.testing.assert_allclose(here.entropy[:, :heads], expected, atol=2e-5)
        np.testing.assert_allclose(here.received[:, :heads], matrix.sum(2), atol=2e-5)
        new = np.where(np.isnan(expected), np.nan, matrix[..., tokens:].sum(-1))
        np.testing.assert_allclose(here.mass.sel(segment="new")[:, :heads], new, atol=1e-5)
        assert here.entropy[:, heads:].isnull().all()
        assert here.received[:, heads:].isnull().all()


def test_static_cache() -> None:
    model, prompt = built("llama"), ids(9)
    _, steps = stored(model, "attentions", input_ids=prompt, do_sample=False)
    seen, _ = generate(
        model, regard.Entropy(), regard.Received(), input_ids=prompt, do_sample=False, cache_implementation="static"
    )
    data = seen.dataset()
    for layer in range(2):
        matrix = joined(steps, layer)
        np.testing.assert_allclose(data.entropy.isel(layer=layer), entropy(matrix), atol=2e-5)
        np.testing.assert_allclose(data.received.isel(layer=layer)[..., : matrix.shape[-1]], matrix.sum(2), atol=2e-5)
        assert not data.received.isel(layer=layer)[..., matrix.shape[-1] :].any()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder(name: str) -> None:
    model, prompt = built(name), ids(9)
    output, steps = stored(model, "cross_attentions", input_ids=prompt, do_sample=False)
    seen, _ = generate(model, regard.Entropy(), regard.Received(), input_ids=prompt, do_sample=False)
    data = seen.dataset()
    kinds = ["encoder", "self", "cross"]
    crosses = [layer for layer in seen.layers if kind_of(layer, kinds) == "cross"]
    for number, layer in enumerate(crosses):
        matrix = np.concatenate([step[number].double().numpy() for step in steps], axis=2)
        here = data.sel(layer=layer)
        np.testing.assert_allclose(here.entropy[:, :, : matrix.shape[2]], entropy(matrix), atol=2e-5)
        np.testing.assert_allclose(here.received, matrix.sum(2), atol=2e-5, rtol=2e-5)
    selves = [layer for layer in seen.layers if kind_of(layer, kinds) == "self"]
    for number, layer in enumerate(selves):
        matrix = joined(output.decoder_attentions, number)
        np.testing.assert_allclose(data.entropy.sel(layer=layer)[:, :, : matrix.shape[2]], entropy(matrix), atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_beam_search(name: str) -> None:
    model, prompt = built(name), ids(9)
    options = {"input_ids": prompt, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    attribute = "attentions" if name == "llama" else "decoder_attentions"
    output, steps = stored(model, attribute, **options)
    seen, watched = generate(model, regard.Entropy(), regard.Received(), **options)
    assert torch.equal(output.sequences, watched.sequences)
    beams = watched.beam_indices[:, :STEPS]
    rows = [tuple(layer[beams[:, number]] for layer in step) for number, step in enumerate(steps)]
    slots, data = seen.dataset(), seen.dataset(beam_indices=beams)
    selves = [layer for layer in seen.layers if kind_of(layer, ["encoder", "self", "cross"]) == "self"]
    if name == "llama":
        selves = seen.layers
        lineage = watched.sequences[:, : seen.token_ids.shape[1]]
        running = {tuple(row.tolist()) for row in seen.token_ids}
        assert tuple(lineage[0].tolist()) in running
    for number, layer in enumerate(selves):
        matrix = joined(rows, number)
        length = matrix.shape[2]
        np.testing.assert_allclose(data.entropy.sel(layer=layer)[:4, :, :length], entropy(matrix), atol=2e-5)
        by_slot = joined(steps, number)
        np.testing.assert_allclose(slots.entropy.sel(layer=layer)[:, :, :length], entropy(by_slot), atol=2e-5)


def test_independent_passes_do_not_join() -> None:
    model = built("llama")
    with torch.no_grad(), regard.watch(model, regard.Entropy()) as seen:
        first: Tensor = ids(9)
        model(input_ids=first)
        model(input_ids=ids(5))
    data = seen.dataset()
    assert data.entropy.dims[0] == "pass"
    assert data.sizes["pass"] == 2
    assert data.entropy.isel({"pass": 1})[:, :, :, 5:].isnull().all()
    assert data.entropy.isel({"pass": 0}).notnull().all()


@pytest.mark.parametrize("target", ["", "model", "model.layers.1.self_attn", None])
@pytest.mark.parametrize("way", ["forward", "base_model.forward"])
@pytest.mark.parametrize("positional", [True, False])
def test_forward_that_is_called_by_itself(target: str | None, way: str, positional: bool) -> None:  # R19
    """In parts, on a cache, and then once more from the beginning."""
    model: Any = built("llama")
    text, watched = ids(9), None if target is None else model.get_submodule(target)
    function = model.forward if way == "forward" else model.base_model.forward

    def run(function: Any) -> None:
        for _ in range(2):
            cache = hf.DynamicCache(config=model.config)
            for part in text.split([5, 3, 1], dim=1):
                if positional and function is not model:
                    function(part, None, None, cache)
                else:
                    function(input_ids=part, past_key_values=cache)

    with torch.no_grad():
        with regard.watch(watched, regard.Entropy(), regard.Received()) as wanted:
            run(model)
        with regard.watch(watched, regard.Entropy(), regard.Received()) as seen:
            run(function)
    expected, data = wanted.dataset(), seen.dataset()
    if target is None and way != "forward":  # there the base model is the outermost
        names = [layer.replace("LlamaForCausalLM.model", "LlamaModel") for layer in wanted.layers]
        expected = expected.assign_coords(layer=names)
    assert data.identical(expected)
    assert data.sizes["pass"] == 2
    assert data.sizes["query"] == 9
    if wanted.token_ids is None:
        assert seen.token_ids is None
    else:
        assert torch.equal(seen.token_ids, text)
