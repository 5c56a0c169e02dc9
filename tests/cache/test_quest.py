"""Which pages each step reads, held to a readable definition in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.cache import KeepAll, Knorm, Quest
from tests.cache.conftest import decoder, texts
from tests.cache.test_families import LATENTS, SHARED, model_of

LLAMA = decoder("llama")
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True
}  # fmt: skip


def pages_by_hand(query: Tensor, keys: Tensor, page: int, number: int) -> set[int]:
    """The tokens that a query (D) reads of keys (tokens, D): those of the pages of the largest bounds."""
    bounds = []
    for start in range(0, len(keys), page):
        own = keys[start : start + page].double()
        least, most = own.amin(0), own.amax(0)
        bounds.append(float(torch.maximum(query.double() * least, query.double() * most).sum()))
    best = sorted(range(len(bounds)), key=lambda place: -bounds[place])[:number]
    return {token for place in best for token in range(place * page, min((place + 1) * page, len(keys)))}


@pytest.mark.parametrize("budget", [12, 0.6, 3])
@pytest.mark.parametrize("page", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(30,), (30, 17)], ids=["one", "padded"])
def test_pages_by_hand(lengths: tuple[int, ...], page: int, budget: int | float) -> None:
    """The last layer of three; what each query reads is found in the rows of its matrix."""
    inputs, calls = texts(*lengths), list[regard.AttentionCall]()

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if call.place.layer == 2:
            calls.append(call)
        return call

    with regard.compress(LLAMA, Quest(budget=budget, page=page)), regard.steer(LLAMA, regard.Custom(note)):
        LLAMA.generate(**inputs, **OPTIONS)
    for step, call in enumerate(calls[1:]):
        tokens = 30 + step + 1
        for row, length in enumerate(lengths):
            real = length + step + 1
            number = max(3, (budget if isinstance(budget, int) else math.ceil(real * budget - 1e-9)) // page)
            for head in range(4):
                keys = call.key[row, :: call.key.shape[1] // 2][head // 2, tokens - real :]
                expected = pages_by_hand(call.query[row, head, 0], keys, page, number)
                mask = call.attn_mask[row, head, 0, tokens - real :]
                found = set((mask if mask.dtype == torch.bool else mask > -1e30).nonzero()[:, 0].tolist())
                assert found == expected, (step, row, head)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", *LATENTS, *SHARED])
def test_generation_watched_is_as_unwatched(name: str, beams: int) -> None:
    """With beams, whose pages follow them; and less than all pages is not all of them."""
    model, inputs = LLAMA if name == "llama" else model_of((LATENTS | SHARED)[name]), texts(20, 13)
    policy = Quest(budget=6, page=2, dense=0)
    with regard.compress(model, policy) as cache:
        plain = model.generate(**inputs, **OPTIONS, num_beams=beams)
    with regard.compress(model, policy), regard.watch(model, regard.Entropy()):
        seen = model.generate(**inputs, **OPTIONS, num_beams=beams)
    assert torch.equal(plain.sequences, seen.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(seen.logits), atol=1e-4, rtol=1e-3)
    full = model.generate(**inputs, **OPTIONS, num_beams=beams)
    assert (plain.logits[1] - full.logits[1]).abs().max() > 1e-3
    assert cache.report().kept == 1
    assert "stay in memory" in str(cache.report())


@pytest.mark.parametrize(
    "policy", [Quest(), Quest(budget=99), Quest(budget=3, dense=3), Quest(budget=3, page=20)], ids=str
)
def test_all_pages_change_nothing(policy: Quest) -> None:
    inputs = texts(20, 13)
    plain = LLAMA.generate(**inputs, **OPTIONS)
    with regard.compress(LLAMA, policy):
        found = LLAMA.generate(**inputs, **OPTIONS)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_is_as_alone(side: str) -> None:
    """Pages are counted from the first token of a text, and over the padding within."""
    both, policy = texts(30, 19), Quest(budget=8, page=4, dense=0)
    if side == "right":
        both = {name: torch.stack([values[0], values[1].roll(-11)]) for name, values in both.items()}
    alone = {name: values[1:, 11:] if side == "left" else values[1:, :19] for name, values in both.items()}
    logits = []
    for inputs in (both, alone):
        mask, ids = inputs["attention_mask"], inputs["input_ids"]
        with torch.no_grad(), regard.compress(LLAMA, policy):
            places = (mask.cumsum(1) - 1).clamp(min=0)
            past, steps = LLAMA(ids, attention_mask=mask, position_ids=places).past_key_values, []
            for step in range(6):
                mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
                token = torch.full((len(mask), 1), 5 + step)
                steps.append(LLAMA(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                                   past_key_values=past).logits[-1, -1])  # fmt: skip
        logits.append(torch.stack(steps))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)


def test_tokens_are_taken_back() -> None:
    """A page of other tokens than those that were taken back is bounded by its own."""
    ids = texts(20)["input_ids"]
    with torch.no_grad(), regard.compress(LLAMA, Quest(budget=6, page=2, dense=0)):
        past = LLAMA(ids).past_key_values
        for token in (5, 6, 7):
            LLAMA(torch.tensor([[token]]), past_key_values=past)
        past.crop(-3)
        found = [LLAMA(torch.tensor([[token]]), past_key_values=past).logits for token in (8, 9, 10)]
        past = LLAMA(ids).past_key_values
        fresh = [LLAMA(torch.tensor([[token]]), past_key_values=past).logits for token in (8, 9, 10)]
    torch.testing.assert_close(torch.cat(found), torch.cat(fresh))


def test_what_it_refuses() -> None:
    for make, message in (
        (lambda: Quest(budget=0.0), r"above 0 and at most 1, got 0.0"),
        (lambda: Quest(budget=True), r"budget must be a number"),
        (lambda: Quest(page=0), r"page must be at least 1 .* got page=0, dense=2"),
        (lambda: Quest(dense=-1), r"dense=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with torch.no_grad(), regard.compress(LLAMA, Knorm(budget=5)):
        past = LLAMA(**texts(12)).past_key_values
    with torch.no_grad(), regard.compress(LLAMA, Quest(dense=0)), \
            pytest.raises(ValueError, match=r"Quest chooses among all entries, but another policy dropped some"):  # fmt: skip
        LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    with torch.no_grad(), regard.compress(LLAMA, KeepAll()):
        LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
