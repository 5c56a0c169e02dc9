"""A compressed cache after its block, copied, saved, and where tokens are taken back, as assisted generation does."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    Every,
    KeepAll,
    Knorm,
    ObservedAttention,
    Policy,
    SnapKV,
    StreamingLLM,
)
from regard.cache.adopt import adopt
from regard.cache.open_block import OpenBlock
from regard.runtime import interceptors
from tests.cache.conftest import DECODERS, decoder, texts
from tests.cache.test_families import LATENTS, SHARED, model_of

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
POLICIES: tuple[Policy, ...] = (
    Knorm(budget=5), Knorm(budget=Adaptive(5)), SnapKV(budget=6, window=2, kernel=3)
)  # fmt: skip


def question(inputs: dict[str, Tensor], number: int) -> dict[str, Any]:
    """A context with a question after it."""
    asked = torch.full((len(inputs["input_ids"]), 1), 10 + number)
    return {
        "input_ids": torch.cat([inputs["input_ids"], asked], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(asked)], 1),
    }


def read(model: Any, inputs: dict[str, Tensor], policy: Policy) -> Any:
    """The cache of a context."""
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.compress(model, policy):
        return model(**inputs, position_ids=places).past_key_values


def copied(cache: Any, beams: int) -> Any:
    """With a row for each beam, as ``generate`` wants it of a cache that it is given."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(beams)
    return copied


@pytest.mark.parametrize("lengths", [(12,), (12, 7)], ids=["one", "padded"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, policy) for name in DECODERS for policy in POLICIES), *((name, POLICIES[0]) for name in LATENTS)],
    ids=str,
)
def test_many_questions_after_the_block(name: str, policy: Policy, beams: int, lengths: tuple[int, ...]) -> None:
    """Each is answered as it is inside a block, from a copy of the context's cache, and the copies are apart."""
    model = decoder(name) if name in DECODERS else model_of(LATENTS[name])
    inputs, options = texts(*lengths), GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    context = read(model, inputs, policy)
    for number in range(3):
        asked = question(inputs, number)
        with regard.compress(model, KeepAll()):
            inside = model.generate(**asked, past_key_values=copied(context, beams), num_beams=beams, **options)
        after = model.generate(**asked, past_key_values=copied(context, beams), num_beams=beams, **options)
        assert torch.equal(inside.sequences, after.sequences)
        torch.testing.assert_close(torch.stack(inside.logits), torch.stack(after.logits), atol=1e-5, rtol=1e-4)
    assert context.get_seq_length() == 12


def test_watching_after_the_block(llama: hf.PreTrainedModel) -> None:
    context = read(llama, texts(12), StreamingLLM(budget=5, sinks=1))
    plain = llama.generate(**question(texts(12), 0), past_key_values=copy.deepcopy(context), **GREEDY)
    with regard.watch(llama, regard.Rows([12])) as seen:
        watched = llama.generate(**question(texts(12), 0), past_key_values=copy.deepcopy(context), **GREEDY)
    assert torch.equal(watched, plain)
    rows = torch.as_tensor(seen.dataset().rows.fillna(0).values).flatten(0, 3)
    assert {tuple(row.nonzero()[:, 0].tolist()) for row in rows} == {(0, 8, 9, 10, 11, 12)}


def test_nothing_is_left_open_after_the_block(llama: hf.PreTrainedModel) -> None:
    context = read(llama, texts(12), Knorm(budget=5))
    with torch.no_grad():
        llama(torch.ones(1, 1, dtype=torch.long), past_key_values=context)
    assert interceptors() == []


def test_a_block_on_another_model_does_not_answer(llama: hf.PreTrainedModel) -> None:
    other, inputs = decoder("qwen3"), texts(12)
    context = read(llama, inputs, Knorm(budget=5))
    alone = llama.generate(**question(inputs, 1), past_key_values=copy.deepcopy(context), **GREEDY)
    with regard.compress(other, Knorm(budget=3)):
        other(**inputs)
        beside = llama.generate(**question(inputs, 1), past_key_values=copy.deepcopy(context), **GREEDY)
    assert torch.equal(alone, beside)


def test_saved_and_loaded(llama: hf.PreTrainedModel) -> None:
    inputs, file = texts(12, 7), io.BytesIO()
    context = read(llama, inputs, Knorm(budget=Adaptive(5)))
    expected = llama.generate(**question(inputs, 2), past_key_values=copy.deepcopy(context), **GREEDY)
    regard.cache.save(context, file)
    file.seek(0)
    loaded = regard.cache.load(file)
    assert torch.equal(llama.generate(**question(inputs, 2), past_key_values=loaded, **GREEDY), expected)
    with pytest.raises(TypeError, match=r"save takes a cache, .* got dict"):
        regard.cache.save({}, file)


@pytest.mark.parametrize("name", ["gemma3", "deepseek v3", "gemma3n"])
def test_saved_inside_a_block_with_queries_to_read(name: str) -> None:
    """What a later block needs is there: windows, latents, borrowed keys."""
    model, inputs, file = (
        decoder(name) if name in DECODERS else model_of((LATENTS | SHARED)[name]),
        texts(12),
        io.BytesIO(),
    )
    policy = SnapKV(budget=6, window=3, when=Every(2))
    with regard.compress(model, policy):
        with torch.no_grad():
            context = model(**inputs).past_key_values
        regard.cache.save(context, file)
        expected = model.generate(**question(inputs, 2), past_key_values=context, **GREEDY)
    file.seek(0)
    with regard.compress(model, policy):
        loaded = regard.cache.load(file, device="cpu")
        assert torch.equal(model.generate(**question(inputs, 2), past_key_values=loaded, **GREEDY), expected)


def test_nothing_else_is_loaded() -> None:
    file = io.BytesIO()
    torch.save(GREEDY | {"what": io.BytesIO}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        regard.cache.load(file)


def test_borrowed_keys_are_read_in_a_block() -> None:
    model, inputs = model_of(SHARED["gemma3n"]), texts(12)
    context = read(model, inputs, Knorm(budget=5))
    with pytest.raises(RuntimeError, match=r"regard.compress\(model, regard.cache.KeepAll\(\)\)"):
        model.generate(**question(inputs, 0), past_key_values=copy.deepcopy(context), **GREEDY)
    with regard.compress(model, KeepAll()) as cache:
        model.generate(**question(inputs, 0), past_key_values=context, **GREEDY)
    assert cache.report().layers[1].kept == [11] * 4


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
@pytest.mark.parametrize(
    "policy",
    [KeepAll(), *POLICIES, TOVA(budget=6, when=AfterPrompt()), StreamingLLM(budget=6, when=AfterPrompt())],
    ids=str,
)
def test_assisted_generation(llama: hf.PreTrainedModel, policy: Policy, way: str) -> None:
    """Writes what is written without an assistant: the prompt alone is compressed, whatever is rejected after it."""
    torch.manual_seed(1)
    assistant = decoder("llama")
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = texts(8)["input_ids"]
    inputs = {"input_ids": torch.cat([ids, ids, ids[:, :3]], 1)}
    helped = {"assistant_model": assistant} if way == "assistant" else {"prompt_lookup_num_tokens": 4}
    options = GREEDY | {"max_new_tokens": 14}
    with regard.compress(llama, policy) as plain:
        expected = llama.generate(**inputs, **options)
    with regard.compress(llama, policy) as cache:
        written = llama.generate(**inputs, **options, **helped)
    assert torch.equal(written, expected)
    for one, other in zip(plain.report().layers, cache.report().layers, strict=True):
        assert torch.equal(one.positions[..., :19], other.positions[..., :19])
        assert abs(one.seen - other.seen) <= 1


def test_assisted_generation_holds_the_budget(llama: hf.PreTrainedModel) -> None:
    ids = texts(8)["input_ids"].repeat(1, 3)
    with regard.compress(llama, StreamingLLM(budget=6, sinks=2)) as cache:
        llama.generate(ids, **GREEDY, prompt_lookup_num_tokens=4)
    for layer in cache.report().layers:
        last = layer.seen
        assert layer.positions[0, 0].nonzero()[:, 0].tolist() == [0, 1, *range(last - 4, last)]
    with pytest.raises(ValueError, match=r"attention of every query, and assisted generation"), \
            regard.compress(llama, ObservedAttention(budget=6)):  # fmt: skip
        llama.generate(ids, **GREEDY, prompt_lookup_num_tokens=4)


def test_tokens_are_taken_back_as_far_as_nothing_was_dropped_for_them(llama: hf.PreTrainedModel) -> None:
    context = read(llama, texts(12), Knorm(budget=5))
    steps = torch.tensor([[21, 22, 23, 24]])
    with torch.no_grad(), regard.compress(llama, KeepAll()):
        llama(steps[:, :1], past_key_values=context)
        expected = llama(steps[:, 1:2], past_key_values=copy.deepcopy(context)).logits
        llama(steps[:, 2:], past_key_values=context)
        context.crop(-2)
        assert context.get_seq_length() == 13
        torch.testing.assert_close(llama(steps[:, 1:2], past_key_values=context).logits, expected)
    with pytest.raises(NotImplementedError, match=r"3 tokens of a compressed cache cannot be taken back"):
        context.crop(-3)


def test_an_offloaded_cache_is_refused_at_once(llama: hf.PreTrainedModel) -> None:
    """Such a cache itself needs a GPU."""
    cache = hf.DynamicCache(config=llama.config)
    cache.offloading = True
    with pytest.raises(ValueError, match=r"offloaded cache; use a DynamicCache without offloading"):
        adopt(cache, 0, llama, OpenBlock(), regard.AttentionCall(*torch.zeros(3, 1, 2, 4, 8)))
