"""ThinK: which channels stay, against their definition in float64, and steps against keys with the others zero."""

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    ChunkKV,
    Every,
    KeepAll,
    Knorm,
    Merge,
    Policy,
    Quantise,
    SnapKV,
    StreamingLLM,
    ThinK,
    Unread,
)
from tests.cache.conftest import decoder, texts
from tests.cache.test_families import LATENTS, LENDERS, SHARED, model_of
from tests.cache.test_kvzip import recorded

WITHIN: tuple[Any, ...] = (
    Knorm(budget=1.0),
    Knorm(budget=6),
    SnapKV(budget=Adaptive(7), window=2),
    ChunkKV(SnapKV(budget=8, window=2), length=2),
)


def read(model: Any, inputs: dict[str, Tensor], policy: Policy) -> tuple[Any, dict[int, Tensor]]:
    """The cache of a prompt, and what is left of it by layer."""
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.compress(model, policy) as block:
        cache = model(**inputs, position_ids=places).past_key_values
    return cache, {layer.layer: layer.positions for layer in block.report().layers if not layer.window}


def channels_of(layer: Any) -> Tensor:
    """(B, Hk, C), of all heads in order."""
    heads = [head for group in layer.groups for head in group.heads]
    return torch.cat([group.channels for group in layer.groups], dim=1)[:, torch.tensor(heads).argsort()]


@pytest.mark.parametrize("lengths", [(16,), (16, 11)], ids=["one", "padded"])
@pytest.mark.parametrize("within", WITHIN, ids=str)
def test_channels_are_those_of_the_highest_products(within: Any, lengths: tuple[int, ...]) -> None:
    model, inputs = decoder("llama"), texts(*lengths)
    cache, left = read(model, inputs, ThinK(within, channels=0.5, window=3))
    for row, length in enumerate(lengths):
        for number, call in enumerate(recorded(model, inputs["input_ids"][row : row + 1, 16 - length :])):
            query, key = call.query[0].double(), call.key[0].double()
            found = channels_of(cache.layers[number])[row]
            for head in range(2):
                stays = left[number][row, head, 16 - length : 16]
                of_keys = key[head, stays].square().mean(dim=0)
                of_queries = query[2 * head : 2 * head + 2, -3:].square().mean(dim=(0, 1))
                best = (of_queries * of_keys).argsort(descending=True)[:4]
                assert found[head].tolist() == sorted(best.tolist())


def narrowed(
    model: Any, ids: Tensor, mask: Tensor, prompt: int, left: dict[int, Tensor], cache: Any, window: int
) -> Tensor:
    """Logits of steps after a prompt, from a plain cache whose other channels are set to zero, others hidden."""

    def hide(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        kept = left.get(LENDERS.get(call.place.layer, call.place.layer))
        if kept is None or call.query.shape[2] > 1:
            return call
        visible = torch.nn.functional.pad(kept, (0, call.key.shape[2] - prompt), value=True)
        visible = visible & mask[:, None, : call.key.shape[2]].bool()
        visible = visible.repeat_interleave(call.query.shape[1] // kept.shape[1], 1)[:, :, None]
        return replace(call, attn_mask=visible, is_causal=False)

    places, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        past = model(ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=places[:, :prompt]).past_key_values
    for number, kept in left.items():
        there = torch.zeros(*kept.shape[:2], past.layers[number].keys.shape[3])
        there = there.scatter(2, channels_of(cache.layers[number]), 1)[:, :, None]
        whole = kept.flip(2).cumsum(2).flip(2) <= window  # as many entries stay from this one on
        past.layers[number].keys = past.layers[number].keys * torch.maximum(there, whole[..., None].float())
    with torch.no_grad(), regard.steer(model, regard.Custom(hide)):
        for place in range(prompt, ids.shape[1]):
            given = {"attention_mask": mask[:, : place + 1], "position_ids": places[:, place : place + 1]}
            logits.append(model(ids[:, place : place + 1], past_key_values=past, **given).logits[:, -1])
    return torch.stack(logits, dim=1)


def steps(model: Any, ids: Tensor, mask: Tensor, prompt: int, cache: Any) -> Tensor:
    places, logits = (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.no_grad():
        for place in range(prompt, ids.shape[1]):
            given = {"attention_mask": mask[:, : place + 1], "position_ids": places[:, place : place + 1]}
            logits.append(model(ids[:, place : place + 1], past_key_values=cache, **given).logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("lengths", [(20,), (20, 13)], ids=["one", "padded"])
@pytest.mark.parametrize(
    ("name", "within"),
    [*(("llama", within) for within in WITHIN), ("gemma3", WITHIN[1]), ("gpt2", WITHIN[2]), ("gpt_oss", WITHIN[1]),
     ("gemma3n", WITHIN[1])],
    ids=str,
)  # fmt: skip
def test_steps_read_what_is_left_of_keys(name: str, within: Any, lengths: tuple[int, ...]) -> None:
    model, inputs = model_of(SHARED[name]) if name in SHARED else decoder(name), texts(*lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    policy = ThinK(within, channels=3, window=2)
    cache, left = read(model, {key: value[:, :16] for key, value in inputs.items()}, policy)
    expected = narrowed(model, ids, mask, 16, left, cache, 2)
    wide = narrowed(model, ids, mask, 16, left, cache, 16)
    with regard.compress(model, KeepAll()):
        found = steps(model, ids, mask, 16, cache)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - wide).abs().max() > 1e-4  # so the channels do matter


def test_the_cache_is_smaller() -> None:
    """Keys of 14 entries with 2 of 8 channels and of 2 whole, values whole, and the numbers of the channels."""
    model = decoder("llama")
    cache, _ = read(model, texts(16), ThinK(Knorm(budget=1.0), channels=0.25, window=2))
    for layer in cache.layers:
        (group,) = layer.groups
        assert group.narrow.shape == (1, 2, 14, 2)
        assert layer.numbers() == 4 * 2 * (14 * 2 + 2 * 8 + 16 * 8) + 8 * 2 * 2
        stored = {
            id(t.untyped_storage()): t.untyped_storage().nbytes() for t in (group.narrow, group.keys, group.values)
        }
        assert sum(stored.values()) == 4 * 2 * (14 * 2 + 2 * 8 + 16 * 8)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize(
    "within",
    [SnapKV(budget=6, window=2), StreamingLLM(budget=6, sinks=1), Knorm(budget=5, when=Every(2)),
     TOVA(budget=6, when=Every(1, prompt=False)), SnapKV(budget=6, window=2, rest=Merge()),
     Knorm(budget=5, when=Every(2), rest=Unread()), Knorm(budget=5, rest=Quantise(group=2))],
    ids=str,
)  # fmt: skip
def test_with_all_channels_it_is_the_policy_within(within: Any, options: dict[str, Any]) -> None:
    """However it generates, whenever it chooses, and whatever becomes of the rest."""
    model, inputs = decoder("llama"), texts(12) if "prompt_lookup_num_tokens" in options else texts(12, 9)
    further = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for policy in (within, ThinK(within, channels=1.0, window=2)):
        torch.manual_seed(0)
        with regard.compress(model, policy):
            found.append(model.generate(**inputs, **further | options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(found[1].logits), atol=1e-4, rtol=1e-3)


def test_entries_grow_narrow_with_the_channels_of_the_prompt() -> None:
    model, inputs = decoder("llama"), texts(12)
    with torch.no_grad(), regard.compress(model, ThinK(Knorm(budget=8, when=Every(2)), channels=2, window=3)):
        past = model(**inputs).past_key_values
        before = [channels_of(layer) for layer in past.layers]
        for token in range(4):
            model(torch.tensor([[5 + token]]), past_key_values=past)
    for layer, channels in zip(past.layers, before, strict=True):
        assert torch.equal(channels_of(layer), channels)
        assert {(group.narrow.shape[2:], group.keys.shape[2]) for group in layer.groups} == {((5, 2), 3)}


def test_saved_copied_and_taken_back() -> None:
    model, inputs, file = decoder("llama"), texts(12), io.BytesIO()
    cache, _ = read(model, inputs, ThinK(SnapKV(budget=Adaptive(6), window=2), channels=3, window=2))
    regard.cache.save(cache, file)
    file.seek(0)
    loaded, ones = regard.cache.load(file), torch.ones(1, 16, dtype=torch.long)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[7, 8, 9, 10]])], dim=1)
    expected = steps(model, ids, ones, 12, copy.deepcopy(cache))
    torch.testing.assert_close(steps(model, ids, ones, 12, loaded), expected)
    with regard.compress(model, KeepAll()):
        steps(model, ids[:, :14], ones[:, :14], 12, cache)
        cache.crop(-2)
        torch.testing.assert_close(steps(model, ids, ones, 12, cache), expected)


def test_watched_it_is_as_unwatched() -> None:
    model, inputs = decoder("llama"), texts(12, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    policy = ThinK(SnapKV(budget=6, window=2), channels=3, window=2)
    with regard.compress(model, policy):
        plain = model.generate(**inputs, **options)
    with regard.compress(model, policy), regard.watch(model, regard.Entropy()):
        seen = model.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(seen.logits), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, r"channels must be a number of them or a share above 0, got 0"),
        ({"channels": 1.5}, r"channels must be a number of them or a share above 0, got 1.5"),
        ({"channels": True}, r"channels must be a number of them or a share above 0, got True"),
        ({"window": 0}, r"window must be at least 1 token, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinK(Knorm(budget=4), **settings)
    with pytest.raises(TypeError, match=r"ThinK goes around a policy with a budget"):
        ThinK(KeepAll())  # type: ignore[arg-type]


def test_what_it_cannot_narrow() -> None:
    with pytest.raises(ValueError, match=r"channels=9, but the keys of model.layers.0.self_attn have 8"):
        read(decoder("llama"), texts(12), ThinK(Knorm(budget=4), channels=9, window=2))
    with pytest.raises(
        NotImplementedError, match=r"ThinK leaves out channels of keys, which a model that caches latents"
    ):
        read(model_of(LATENTS["deepseek v3"]), texts(12), ThinK(Knorm(budget=4), window=2))
