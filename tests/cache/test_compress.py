"""Compression in plain generate: every kind of decoder, decoding method and batch."""

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    Budget,
    BudgetPolicy,
    Every,
    KeepAll,
    Knorm,
    ObservedAttention,
    Policy,
    SnapKV,
    StreamingLLM,
)
from tests.cache.conftest import DECODERS, decoder, texts

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
}
ALONE: tuple[Policy, ...] = (
    SnapKV(budget=0.5, window=2),  # not Knorm: some models give all keys one norm, and rounding would choose
    SnapKV(budget=Adaptive(0.5), window=2),
    TOVA(budget=5),
)


def generate(model: hf.PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The tokens (texts, N), or with ``return_dict_in_generate`` what else is told of them."""
    torch.manual_seed(0)
    return model.generate(**inputs, **({"max_new_tokens": 8, "do_sample": False} | options))


@pytest.mark.parametrize("lengths", [(12,), (12, 5)], ids=["one", "padded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_keep_all_changes_nothing(name: str, way: str, lengths: tuple[int, ...]) -> None:
    model, inputs = decoder(name), texts(*lengths)
    plain = generate(model, inputs, **WAYS[way])
    with regard.compress(model, KeepAll()) as cache:
        kept = generate(model, inputs, **WAYS[way])
    assert torch.equal(kept, plain)
    assert cache.report().kept == 1.0


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("policy", ALONE, ids=str)
def test_a_text_in_a_padded_batch_is_as_alone(policy: Policy, name: str, way: str) -> None:
    model, both = decoder(name), texts(12, 9)
    alone = {key: value[1:, 3:] for key, value in both.items()}
    options = WAYS[way] | {"return_dict_in_generate": True, "output_logits": True}
    with regard.compress(model, policy):
        together = generate(model, both, **options)
    with regard.compress(model, policy):
        single = generate(model, alone, **options)
    assert torch.equal(together.sequences[1, 3:], single.sequences[0])
    beams = together.logits[0].shape[0] // 2
    torch.testing.assert_close(together.logits[0][beams:], single.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(12,), (12, 5)], ids=["one", "padded"])
@pytest.mark.parametrize("budget", [4, Adaptive(4)], ids=str)
@pytest.mark.parametrize("name", [*DECODERS, "gpt_oss"])
def test_a_step_attends_to_what_is_left_at_its_own_position(
    name: str, budget: int | Budget, lengths: tuple[int, ...]
) -> None:
    """Logits of steps after compression are those of the whole text with the dropped entries hidden by a mask."""
    model, inputs = decoder(name), texts(*lengths)
    written = generate(model, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 8, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.compress(model, Knorm(budget=budget)) as cache:
        past = model(**inputs, position_ids=positions[:, :12]).past_key_values
        left = {layer.layer: layer.positions for layer in cache.report().layers if not layer.window}
        logits = []
        for step in range(12, 16):
            seen = model(written[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=past,
                         position_ids=positions[:, step : step + 1])  # fmt: skip
            logits.append(seen.logits[:, -1])

    def hide(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        queries, keys = call.query.shape[2], call.key.shape[2]
        visible = call.attn_mask
        if visible is None:
            visible = torch.ones(queries, keys, dtype=torch.bool).tril()
        elif visible.dtype != torch.bool:
            visible = visible > -1e30
        visible = visible.expand(call.query.shape[0], call.query.shape[1], -1, -1).clone()
        if call.place.layer in left:
            shared = call.query.shape[1] // left[call.place.layer].shape[1]
            gone = ~left[call.place.layer].repeat_interleave(shared, 1)
            visible[:, :, 12:, :12] &= ~gone[:, :, None]
        return regard.AttentionCall(
            call.query, call.key, call.value, visible, scale=call.scale, enable_gqa=True, sinks=call.sinks,
        )  # fmt: skip

    with torch.no_grad(), regard.steer(model, regard.Custom(hide)):
        whole = model(written[:, :16], attention_mask=mask[:, :16], position_ids=positions[:, :16]).logits[:, 12:]
    torch.testing.assert_close(torch.stack(logits, 1), whole, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("policy", [Knorm(budget=6), SnapKV(budget=6, window=2), ObservedAttention(budget=6),
                                    Knorm(budget=Adaptive(6))], ids=str)  # fmt: skip
def test_several_turns_on_one_cache(llama: hf.PreTrainedModel, policy: Policy) -> None:
    """A second turn sees what is left of the first, and itself; the cache stays small; positions count on."""
    first, second = texts(12)["input_ids"], texts(7, seed=1)["input_ids"]
    past = hf.DynamicCache(config=llama.config)
    with torch.no_grad(), regard.compress(llama, policy) as cache:
        llama(first, past_key_values=past)
        left = [layer.positions for layer in cache.report().layers]
        turn = llama(second, past_key_values=past).logits
        report = cache.report()
    assert past.get_seq_length() == 19
    assert all(sum(layer.kept) == 12 for layer in report.layers)
    both = torch.cat([first, second], 1)

    def hide(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        visible = torch.ones(19, 19, dtype=torch.bool).tril().repeat(1, 4, 1, 1)
        visible[:, :, 12:, :12] &= left[call.place.layer].repeat_interleave(2, 1)[:, :, None]
        return regard.AttentionCall(call.query, call.key, call.value, visible, enable_gqa=True)

    with torch.no_grad(), regard.steer(llama, regard.Custom(hide)):
        whole = llama(both).logits[:, 12:]
    torch.testing.assert_close(turn, whole, atol=2e-4, rtol=1e-3)


def test_generate_goes_on_with_a_cache_of_an_earlier_turn(llama: hf.PreTrainedModel) -> None:
    first, past = texts(12), hf.DynamicCache(config=llama.config)
    with regard.compress(llama, StreamingLLM(budget=8)) as cache:
        written = generate(llama, first, past_key_values=past)
        more = torch.cat([written, texts(5, seed=2)["input_ids"]], 1)
        again = generate(llama, {"input_ids": more, "attention_mask": torch.ones_like(more)}, past_key_values=past)
    assert again.shape == (1, 12 + 8 + 5 + 8)
    (layer, *_) = cache.report().layers
    assert (layer.seen, layer.kept) == (32, [8, 8])


def test_decoding_compresses_at_every_nth_step(llama: hf.PreTrainedModel) -> None:
    lengths = []
    with torch.no_grad(), regard.compress(llama, Knorm(budget=6, when=Every(3, prompt=False))) as cache:
        past = llama(**texts(12)).past_key_values
        for _ in range(7):
            llama(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
            lengths.append(cache.report().layers[0].kept[0])
    assert lengths == [13, 14, 6, 7, 8, 6, 7]


@pytest.mark.parametrize("budget", [0.25, Adaptive(0.25)], ids=str)
def test_memory_is_really_freed(llama: hf.PreTrainedModel, budget: float | Budget) -> None:
    with torch.no_grad(), regard.compress(llama, Knorm(budget=budget)) as cache:
        past = llama(**texts(40)).past_key_values
    held = sum(t.untyped_storage().nbytes() for layer in past.layers for g in layer.groups for t in (g.keys, g.values))
    report = cache.report()
    assert held == report.bytes == report.full_bytes // 4
    assert budget == 0.25 or len({kept for layer in report.layers for kept in layer.kept}) > 1


def test_sliding_layers_are_left_alone() -> None:
    model = decoder("gemma3")
    with torch.no_grad(), regard.compress(model, Knorm(budget=5)) as cache:
        model(**texts(20))
    layers = cache.report().layers
    assert [layer.window for layer in layers] == [True, True, False]
    assert [layer.kept[0] for layer in layers] == [7, 7, 5]
    assert "sliding window, left alone" in str(cache.report())


@pytest.mark.parametrize("policy", [Knorm(budget=5), ObservedAttention(budget=5), SnapKV(budget=5, window=2),
                                    Knorm(budget=Adaptive(5))], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(12,), (12, 7)], ids=["one", "padded"])
def test_watching_changes_nothing_and_sees_what_is_left(
    llama: hf.PreTrainedModel, policy: BudgetPolicy, lengths: tuple[int, ...]
) -> None:
    inputs = texts(*lengths)
    with regard.compress(llama, policy):
        plain = generate(llama, inputs, output_logits=True, return_dict_in_generate=True)
    with regard.compress(llama, policy) as cache, regard.watch(llama, regard.Rows([12, 15])) as seen:
        watched = generate(llama, inputs, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(watched.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
    rows = torch.as_tensor(seen.dataset().rows.fillna(0).values)  # (layer, batch, head, 2, key)
    assert rows.shape[-1] == 19
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    if not policy.when.while_decoding:
        left = torch.stack([layer.positions for layer in cache.report().layers]).repeat_interleave(2, 2)
        assert not rows[..., 0, :12][~left[..., :12]].any()


def test_a_cache_follows_its_texts(llama: hf.PreTrainedModel) -> None:
    """Repeated, some alone, begun anew."""
    inputs, word = texts(12, 12), torch.tensor([[5], [6]])
    with torch.no_grad(), regard.compress(llama, Knorm(budget=Adaptive(4))):
        first = llama(**inputs)
        past = first.past_key_values
        wanted = llama(word, past_key_values=copy.deepcopy(past)).logits
        past.batch_repeat_interleave(2)
        repeated = llama(word.repeat_interleave(2, 0), past_key_values=copy.deepcopy(past)).logits
        past.batch_select_indices(torch.tensor([2, 0]))
        turned = llama(word.flip(0), past_key_values=past).logits
        past.reset()
        anew = llama(**inputs, past_key_values=past).logits
    torch.testing.assert_close(repeated, wanted.repeat_interleave(2, 0))
    torch.testing.assert_close(turned, wanted.flip(0))
    torch.testing.assert_close(anew, first.logits)


def test_steering_a_compressed_model(llama: hf.PreTrainedModel) -> None:
    """Edits name positions of the text, whatever was dropped."""
    edit = regard.Block(keys=slice(0, 4), queries=slice(12, None))
    with regard.compress(llama, StreamingLLM(budget=6, sinks=2)), regard.steer(llama, edit), \
            regard.watch(llama, regard.Rows([14])) as seen:  # fmt: skip
        generate(llama, texts(12))
    rows = torch.as_tensor(seen.dataset().rows.fillna(0).values)
    assert {tuple(row.nonzero()[:, 0].tolist()) for row in rows.flatten(0, 3)} == {(10, 11, 12, 13, 14)}


def test_policies_read_the_steered_matrix(llama: hf.PreTrainedModel) -> None:
    with torch.no_grad(), regard.compress(llama, TOVA(budget=4)) as cache, \
            regard.steer(llama, regard.Reweight(keys=[3, 5], by=1e6)):  # fmt: skip
        llama(**texts(12))
    for layer in cache.report().layers:
        assert layer.positions[:, :, [3, 5]].all()


def test_the_model_is_as_before(llama: hf.PreTrainedModel) -> None:
    hooks = copy.copy(llama._forward_pre_hooks), copy.copy(llama._forward_hooks)
    inputs = texts(12)
    plain = generate(llama, inputs)
    with contextlib.suppress(KeyError), regard.compress(llama, Knorm(budget=0.5)):
        generate(llama, inputs)
        raise KeyError
    assert (llama._forward_pre_hooks, llama._forward_hooks) == hooks
    assert torch.equal(generate(llama, inputs), plain)


def test_what_cannot_be_compressed_is_refused(llama: hf.PreTrainedModel) -> None:
    inputs = texts(12)
    with pytest.raises(ValueError, match=r"whose layers are StaticLayer; use a DynamicCache"), \
            regard.compress(llama, Knorm(budget=0.5)):  # fmt: skip
        generate(llama, inputs, cache_implementation="static")

    class QuantizedLayer(hf.cache_utils.DynamicLayer):
        """As of transformers, whose own need a further package."""

    quantised = hf.cache_utils.Cache(layers=[QuantizedLayer() for _ in range(3)])
    with pytest.raises(ValueError, match=r"whose layers are quantised"), regard.compress(llama, Knorm(budget=0.5)):
        llama(**inputs, past_key_values=quantised)
    small = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    bart = hf.BartForConditionalGeneration(hf.BartConfig(d_model=16, vocab_size=97, **small)).eval()
    with pytest.raises(ValueError, match=r"not on EncoderDecoderCache"), regard.compress(bart, Knorm(budget=0.5)):
        bart.generate(**inputs, max_new_tokens=3)


def test_attention_that_is_not_seen_is_refused(llama: hf.PreTrainedModel) -> None:
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RuntimeError, match=r'set_attn_implementation\("sdpa"\)'), \
            regard.compress(llama, Knorm(budget=0.5)):  # fmt: skip
        pass


def test_eager_attention_is_compressed_alike(llama: hf.PreTrainedModel) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    logits = []
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with regard.compress(llama, Knorm(budget=0.5)):
            logits.append(torch.stack(llama.generate(**texts(12), **options).logits))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_misuse(llama: hf.PreTrainedModel) -> None:
    inputs, policy = texts(12), Knorm(budget=0.5)
    with pytest.raises(TypeError, match=r"needs a model of transformers, got str"):
        regard.compress("llama", policy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs a policy such as .* got <class .*Knorm'>\(…\)"):
        regard.compress(llama, Knorm)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"was not run inside the block"), regard.compress(llama, policy):
        pass
    with pytest.raises(RuntimeError, match=r"kept no keys and values"), regard.compress(llama, policy):
        llama(**inputs, use_cache=False)
    with regard.compress(llama, policy):
        with pytest.raises(RuntimeError, match=r"being compressed already"):
            regard.compress(llama, policy).__enter__()
        llama(**inputs)
    with regard.compress(llama, policy) as cache:
        with pytest.raises(RuntimeError, match=r"nothing to report"):
            cache.report()
        past = llama(**inputs).past_key_values
    with pytest.raises(NotImplementedError, match=r"entries were dropped for them"):
        past.crop(-1)
    with pytest.raises(RuntimeError, match=r"read by a model alone"):
        past.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert math.isclose(cache.report().kept, 0.5)
