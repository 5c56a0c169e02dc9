"""CaM by hand: what leaves the window is in the values of those after it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.cache import CaM, Entries, Merge
from tests.cache.conftest import decoder, texts
from tests.cache.test_families import LATENTS, SHARED, model_of

LLAMA = decoder("llama")


def merged_by_hand(values: Tensor, received: Tensor, stays: Tensor, drawn: Tensor, neighbours: int) -> Tensor:
    """Of one head: values (entries, width), which stay, and uniform numbers to be below the chance."""
    after = values.clone().double()
    kept = stays.nonzero()[:, 0].tolist()
    for entry in (~stays).nonzero()[:, 0].tolist():
        targets = [place for place in kept if place > entry][:neighbours]
        chance = float(received[entry] / received[targets].mean()) if targets else 0.0
        if float(drawn[entry]) < min(chance, 1.0):
            for place in targets:
                after[place] += values[entry].double() / len(targets)
    return after


@pytest.mark.parametrize("neighbours", [1, 3, 32])
@pytest.mark.parametrize("going", [[4], [2, 5, 6]])
def test_values_by_hand(neighbours: int, going: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(going))
    values, received = torch.randn(2, 2, 12, 5, generator=generator), torch.rand(2, 2, 12, generator=generator)
    positions = torch.arange(12).expand(2, 2, -1)
    real = torch.ones_like(positions, dtype=torch.bool)
    stays = real.clone()
    stays[..., going] = False
    call: Any = type("Call", (), {"is_latent": False})()
    entries = Entries(1, 3, values, values, positions, real, received, None, 40, {}, new=1, made_by=call)
    found = Merge(neighbours=neighbours, seed=3).merged(entries, stays)
    drawn = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(hash((3, 1, 40))))
    for row in range(2):
        for head in range(2):
            expected = merged_by_hand(
                values[row, head], received[row, head], stays[row, head], drawn[row, head], neighbours
            )
            torch.testing.assert_close(found[row, head][stays[row, head]].double(), expected[stays[row, head]])


@pytest.mark.parametrize("lengths", [(14,), (14, 9)])
def test_a_step_of_the_first_layer(lengths: tuple[int, ...]) -> None:
    """The entry that goes is the first after the sinks; its attention is that of the step's query to what is there."""
    inputs = texts(*lengths)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 1, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    calls: list[regard.AttentionCall] = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        calls.append(call)
        return call

    ids = torch.cat([inputs["input_ids"], torch.full((len(lengths), 1), 9)], 1)
    with torch.no_grad(), regard.steer(LLAMA, regard.Custom(note)):
        LLAMA(ids, attention_mask=mask, position_ids=places)
    with (
        torch.no_grad(),
        regard.compress(LLAMA, CaM(budget=7, sinks=2, rest=Merge(neighbours=3, seed=5, prompt=False))),
    ):
        past = LLAMA(**inputs, position_ids=places[:, :14]).past_key_values
        LLAMA(ids[:, 14:], attention_mask=mask, position_ids=places[:, 14:], past_key_values=past)
    (group,) = past.layers[0].groups
    drawn = torch.rand(len(lengths), 2, 8, generator=torch.Generator().manual_seed(hash((5, 0, 15))))
    changed = 0
    for row, length in enumerate(lengths):
        start = 14 - length
        held = [start, start + 1, *range(9, 15)]
        for head in range(2):
            key, value = (t[row, head * (t.shape[1] // 2), held] for t in (calls[0].key, calls[0].value))
            query = calls[0].query[row, 2 * head : 2 * head + 2, -1].double()
            received = (query @ key.double().T / math.sqrt(8)).softmax(-1).mean(0)
            stays = torch.arange(8) != 2
            expected = merged_by_hand(value, received, stays, drawn[row, head], 3)[stays]
            torch.testing.assert_close(group.values[row, head].double(), expected, atol=1e-5, rtol=1e-4)
            changed += int(not torch.allclose(expected, value[stays].double()))
    assert changed


def test_a_prompt_merges_nothing_and_generation_goes_on() -> None:
    policy = CaM(budget=8, sinks=2)
    with torch.no_grad(), regard.compress(LLAMA, policy):
        values = LLAMA(**texts(20)).past_key_values.layers[0].groups[0].values
    with torch.no_grad(), regard.compress(LLAMA, regard.cache.StreamingLLM(budget=8, sinks=2)):
        assert torch.equal(LLAMA(**texts(20)).past_key_values.layers[0].groups[0].values, values)
    with regard.compress(LLAMA, policy) as cache:
        LLAMA.generate(**texts(20, 13), max_new_tokens=6, do_sample=False, num_beams=2)
    assert all(layer.kept == [8, 8] for layer in cache.report().layers)


def test_a_layer_that_borrows_reads_values_as_its_lender_did() -> None:
    """Watched or not, and with the values that were merged since put back for it."""
    model, ids = model_of(SHARED["gemma4"]), texts(16)["input_ids"]
    read: list[Tensor] = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if call.place.layer in (3, 5):
            read.append(call.value[:, :: call.value.shape[1] // 4])
        return call

    with torch.no_grad(), regard.compress(model, CaM(budget=8, sinks=1)), regard.steer(model, regard.Custom(note)):
        past = model(ids[:, :12]).past_key_values
        read.clear()
        for end in range(13, 17):
            model(ids[:, end - 1 : end], past_key_values=past)
    for lender, borrower in zip(read[::2], read[1::2], strict=True):
        assert torch.equal(lender, borrower)


def test_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"neighbours must be at least 1, got 0"):
        Merge(neighbours=0)
    model = model_of(LATENTS["deepseek v3"])
    with pytest.raises(NotImplementedError, match=r"caches latents"), regard.compress(model, CaM(budget=8)):
        model.generate(**texts(20), max_new_tokens=3, do_sample=False)
