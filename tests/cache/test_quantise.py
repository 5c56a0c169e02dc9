"""Entries with few bits, and entries left unread: what is stored, and what becomes of it with every kind of cache."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regard
from regard.cache import AfterPrompt, Every, KeepAll, Knorm, Policy, Quantise, SnapKV, StreamingLLM, Unread
from regard.cache.packed import Packed
from tests.cache.conftest import decoder, texts, watched_as_unwatched
from tests.cache.test_families import LATENTS, SHARED, model_of

LLAMA = decoder("llama")
FEW = Quantise(bits=4, group=4)
SLOTS: tuple[dict[str, Any], ...] = ({"rest": FEW}, {"rest": FEW, "when": Every(2)}, {"rest": Unread()})
POLICIES = tuple(SnapKV(budget=6, window=2, kernel=3, **slots) for slots in SLOTS)


@given(
    st.sampled_from([4, 8]), st.sampled_from([2, 3]), st.sampled_from([2, 4, 8]), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([1e-3, 1.0, 100.0]),
)  # fmt: skip
def test_numbers_come_back_to_half_a_step(
    bits: int, dim: int, group: int, seed: int, dtype: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = (size * torch.randn(2, 3, 8, 16, generator=generator)).to(dtype)
    numbers[0, 0] = numbers[0, 0, 0, 0]  # a range of zero
    packed = Packed.of(numbers, bits, dim, group)
    found = packed.unpack()
    assert found.dtype == dtype
    grouped = numbers.double().unflatten(dim, (-1, group))
    step = (grouped.amax(dim + 1, keepdim=True) - grouped.amin(dim + 1, keepdim=True)) / (2**bits - 1)
    error = (found.double().unflatten(dim, (-1, group)) - grouped).abs()
    rounding = torch.finfo(dtype).eps * grouped.abs().amax(dim + 1, keepdim=True) * 2 + torch.finfo(dtype).tiny
    assert bool((error <= step / 2 + rounding).all())
    assert torch.equal(found[0, 0], numbers[0, 0])
    assert packed.codes.numel() == numbers.numel() * bits // 8
    groups = numbers.numel() // group
    assert packed.bytes == numbers.numel() * bits // 8 + 2 * groups * numbers.element_size()


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of one query, (B, Hq, 1, D), two query heads sharing a key head, in float64."""
    key, value = (tensor.double().repeat_interleave(2, 1) for tensor in (key, value))
    return (query.double() @ key.mT / math.sqrt(query.shape[-1])).softmax(-1) @ value


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_attends_to_the_packed_entries(bits: int) -> None:
    """The output of the first layer's attention, against all entries dequantised by hand."""
    ids, outputs, queries = texts(21)["input_ids"], list[Tensor](), list[Tensor]()
    handle = LLAMA.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    policy = StreamingLLM(budget=5, sinks=0, rest=Quantise(bits=bits, group=4))

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        queries.append(call.query)
        return call

    with torch.no_grad(), regard.compress(LLAMA, policy):
        past = LLAMA(ids[:, :20]).past_key_values
        before = copy.deepcopy(past.layers[0])
        LLAMA(ids[:, 20:], past_key_values=past)
    handle.remove()
    with torch.no_grad(), regard.steer(LLAMA, regard.Custom(note)):
        whole = LLAMA(ids).past_key_values.layers[0]
    (group,) = before.groups
    assert (group.length, group.packed.length) == (8, 12)  # a group more would be 16, of which 15 may go
    assert torch.equal(group.packed.positions, torch.arange(12).expand(1, 2, -1))
    key, value = (torch.cat([packed.unpack(), full[:, :, 12:]], 2) for packed, full in
                  ((group.packed.keys, whole.keys), (group.packed.values, whole.values)))  # fmt: skip
    expected = attention(queries[0][:, :, 20:], key, value)
    torch.testing.assert_close(outputs[-1].view(1, 4, 1, 8).double(), expected, atol=1e-5, rtol=1e-4)
    assert (expected - attention(queries[0][:, :, 20:], whole.keys, whole.values)).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_what_is_stored(bits: int) -> None:
    with torch.no_grad(), regard.compress(LLAMA, Knorm(budget=8, rest=Quantise(bits=bits, group=8))) as cache:
        past = LLAMA(**texts(40)).past_key_values
    parts = [
        part
        for layer in past.layers
        for group in layer.groups
        for packed in (group.packed.keys, group.packed.values)
        for part in (packed.codes, packed.scale, packed.zero)
    ]
    own = [tensor for layer in past.layers for group in layer.groups for tensor in (group.keys, group.values)]
    report = cache.report()
    assert report.bytes == sum(tensor.untyped_storage().nbytes() for tensor in (*parts, *own))
    assert [(layer.kept, layer.quantised) for layer in report.layers] == [([8, 8], [32, 32])] * 3
    assert "8 of 40 tokens, 32 quantised, " in str(report)
    assert report.full_bytes * (0.2 + 0.8 * bits / 32) < report.bytes < report.full_bytes


def test_full_groups_go_as_they_come_together() -> None:
    """KIVI's cache: the last tokens whole, and up to a group less one that are waiting."""
    kept = []
    with torch.no_grad(), regard.compress(LLAMA, StreamingLLM(budget=6, sinks=0, rest=FEW)) as cache:
        past = LLAMA(**texts(15)).past_key_values
        for _ in range(6):
            (layer, *_) = cache.report().layers
            kept.append((layer.kept[0], layer.quantised[0]))
            last = layer.positions[0, 0].nonzero()[:, 0].tolist()
            assert last == list(range(layer.seen - layer.kept[0], layer.seen))
            LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    assert kept == [(7, 8), (8, 8), (9, 8), (6, 12), (7, 12), (8, 12)]


def test_what_is_unread_is_in_memory_and_may_come_back() -> None:
    """Knorm chooses anew at every second step among all entries."""
    policy = Knorm(budget=4, when=Every(2), rest=Unread())
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        past = LLAMA(**texts(12)).past_key_values
        for step in range(6):
            LLAMA(torch.full((1, 1), 3 + step), past_key_values=past)
    report = cache.report()
    for layer, held in zip(report.layers, past.layers, strict=True):
        keys = held.groups[0].keys
        assert keys.shape[2] == 18
        best = (-keys.norm(dim=-1)).topk(4, dim=-1).indices
        assert torch.equal(layer.positions, torch.zeros(1, 2, 18, dtype=torch.bool).scatter(2, best, True))
    assert [(layer.kept, layer.unread) for layer in report.layers] == [([4, 4], [14, 14])] * 3
    assert report.bytes >= report.full_bytes
    assert "4 of 18 tokens, 14 unread" in str(report)
    assert "stay in memory" in str(report)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["llama", *LATENTS, *SHARED])
def test_models_of_every_kind(name: str, policy: Policy) -> None:
    """Generation watched is as unwatched, with beams too; and what is less than whole does matter, or is near."""
    model = LLAMA if name == "llama" else model_of((LATENTS | SHARED)[name])
    watched_as_unwatched(model, texts(14, 9), policy)


@pytest.mark.parametrize("name", ["llama", *LATENTS])
def test_many_bits_are_near_the_full_cache(name: str) -> None:
    model, inputs = LLAMA if name == "llama" else model_of(LATENTS[name]), texts(14, 9)
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    full = model.generate(**inputs, **options).logits[1]
    error = {}
    for rest in (Quantise(bits=8, group=4), Quantise(bits=4, group=4)):
        with regard.compress(model, Knorm(budget=2, rest=rest)):
            error[rest.bits] = float((model.generate(**inputs, **options).logits[1] - full).abs().max())
    assert 0 < error[8] < error[4]
    assert error[8] < 0.05 * float(full.abs().max())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_copied_saved_and_read_after_the_block(policy: Policy) -> None:
    inputs, file = texts(14, 9), io.BytesIO()
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.compress(LLAMA, policy):
        context = LLAMA(**inputs, position_ids=places).past_key_values
    asked = {name: torch.cat([value, torch.ones(2, 1, dtype=torch.long)], 1) for name, value in inputs.items()}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with regard.compress(LLAMA, KeepAll()):
        expected = LLAMA.generate(**asked, past_key_values=copy.deepcopy(context), **options)
    regard.cache.save(context, file)
    file.seek(0)
    assert torch.equal(LLAMA.generate(**asked, past_key_values=regard.cache.load(file), **options), expected)
    assert torch.equal(LLAMA.generate(**asked, past_key_values=context, **options), expected)


@pytest.mark.parametrize("policy", POLICIES[::2], ids=str)
def test_tokens_are_taken_back(policy: Policy) -> None:
    """Those that came since the choice; of entries that are unread in memory, any."""
    steps = torch.tensor([[21, 22, 23]])
    with torch.no_grad(), regard.compress(LLAMA, policy):
        past = LLAMA(**texts(14)).past_key_values
        expected = LLAMA(steps[:, :1], past_key_values=copy.deepcopy(past)).logits
        LLAMA(steps[:, 1:2], past_key_values=past)
        past.crop(-1)
        torch.testing.assert_close(LLAMA(steps[:, :1], past_key_values=past).logits, expected)
        past.crop(-1)
        if isinstance(policy.rest, Unread):
            past.crop(-2)
            assert past.get_seq_length() == 12
            LLAMA(steps[:, :1], past_key_values=past)
        else:
            with pytest.raises(NotImplementedError, match=r"cannot be taken back"):
                past.crop(-2)


@pytest.mark.parametrize("rest", [FEW, Unread()], ids=str)
def test_assisted_generation_writes_what_is_written_without(rest: Any) -> None:
    ids = texts(8)["input_ids"].repeat(1, 3)
    policy = SnapKV(budget=8, window=2, kernel=3, rest=rest)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with regard.compress(LLAMA, policy):
        expected = LLAMA.generate(ids, **options)
    with regard.compress(LLAMA, policy):
        assert torch.equal(LLAMA.generate(ids, **options, prompt_lookup_num_tokens=3), expected)


def test_a_later_block_may_drop_what_an_earlier_one_left_unread() -> None:
    with torch.no_grad(), regard.compress(LLAMA, Knorm(budget=4, rest=Unread())):
        past = LLAMA(**texts(12)).past_key_values
    with torch.no_grad(), regard.compress(LLAMA, Knorm(budget=5, when=Every(1))) as cache:
        LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    assert all((layer.kept, layer.unread) == ([5, 5], [0, 0]) for layer in cache.report().layers)
    assert past.layers[0].groups[0].keys.shape[2] == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantise(bits=3), r"Quantise: bits must be 8 or 4, got 3"),
        (lambda: Quantise(bits=True), r"got True"),
        (lambda: Quantise(group=0), r"Quantise: group must be an even number of at least 2, got 0"),
        (lambda: Quantise(group=5), r"got 5"),
        (
            lambda: Knorm(budget=3, rest=AfterPrompt()),
            r"rest must be such as Drop\(\) or Merge\(\), got AfterPrompt\(\)",
        ),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
