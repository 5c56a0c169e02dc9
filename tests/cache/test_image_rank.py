"""ImageRank drops the image tokens that the last token looks at least, and no others."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import BudgetPolicy, Entries, Every, ImageRank, KeepAll
from regard.tokens import ImageTokens, decoder_layers
from tests.cache.images import SEERS, generate, pair, reader
from tests.cache.reference import matrix
from tests.steer.vision.conftest import IMAGE, Seer


def entries(layer: int, received: list[list[float]], memory: dict[Any, Any]) -> Entries:
    """One text of 8 tokens, of which 2 to 5 are the image; ``received`` by key head."""
    heads = len(received)
    keys = torch.zeros(1, heads, 8, 2, dtype=torch.float64)
    positions = torch.arange(8).expand(1, heads, 8)
    image = torch.tensor([[False, False, True, True, True, True, False, False]])
    return Entries(
        layer, 4, keys, keys, positions, torch.ones_like(positions, dtype=torch.bool),
        torch.tensor([received], dtype=torch.float64), None, 8, memory,
        new=8, beside=image,
    )  # fmt: skip


def kept(policy: ImageRank, given: Entries) -> list[list[int]]:
    scores = policy.score(given)
    counts = policy.counts(given, scores)
    return [
        sorted(row.argsort(descending=True, stable=True)[:count].tolist())
        for row, count in zip(scores[0], counts[0].tolist(), strict=True)
    ]


def test_by_hand() -> None:
    """The mean over heads ranks 4 (0.30) before 3 (0.25), 5 (0.10) and 2 (0.05); text counts for nothing."""
    policy, memory, everything = ImageRank(budget=0.5), dict[Any, Any](), [[*range(8)]] * 2
    other = [[0.9, 0, 0.1, 0, 0, 0, 0, 0]] * 2
    ranked = [[0, 0, 0.1, 0.5, 0.2, 0.1, 0, 0.1], [0.3, 0, 0.0, 0.0, 0.4, 0.1, 0.1, 0.1]]
    assert kept(policy, entries(0, other, memory)) == everything
    assert kept(policy, entries(1, ranked, memory)) == everything
    assert kept(policy, entries(2, other, memory)) == [[0, 1, 3, 4, 6, 7]] * 2
    assert kept(policy, entries(3, other, memory)) == [[0, 1, 3, 4, 6, 7]] * 2
    one, first = ImageRank(budget=1, layer=1), dict[Any, Any]()
    assert kept(one, entries(0, ranked, first)) == everything
    assert kept(one, entries(1, other, first)) == [[0, 1, 4, 6, 7]] * 2


def last_rows(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the last token gives the others in each layer of the language model, the mean over its heads, (B, N)."""
    found = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if "vis" not in call.place.path:
            shared = call.query.shape[1] // call.key.shape[1]
            key = call.key if shared == 2 else call.key[:, ::2]
            rows = matrix(call.query[:, :, -1:], key, inputs["attention_mask"].bool())
            found.append(rows[:, :, 0].mean(1))
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        model(**inputs)
    return found


def expected(ranks: Tensor, inputs: dict[str, Tensor], count: Callable[[int], int]) -> Tensor:
    """(B, N): text, and so many of each text's image tokens."""
    stay = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    for row, ids in enumerate(inputs["input_ids"]):
        image = [place for place in range(len(ids)) if ids[place] == IMAGE]
        image.sort(key=lambda place, row=row: -float(ranks[row, place]))
        stay[row, image[: count(len(image))]] = True
    return stay


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("budget", [0.25, 0.5, 5])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SEERS)
def test_the_rule_on_models(name: str, batch: int, budget: float, layer: int) -> None:
    seer = SEERS[name]()
    seer.model.double()
    inputs = seer.inputs if batch == 1 else pair(seer)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    stay = expected(
        last_rows(seer.model, inputs)[layer - 1],
        inputs,
        lambda number: budget if isinstance(budget, int) else math.ceil(number * budget),
    )
    with torch.no_grad(), regard.compress(seer.model, ImageRank(budget=budget, layer=layer)) as cache:
        seer.model(**inputs)
    layers = cache.report().layers
    assert len(layers) == 4
    for number, found in enumerate(layers):
        if number < layer:
            assert found.kept == [22, 22]
            assert found.positions.all()
        else:
            assert torch.equal(found.positions, stay[:, None].expand_as(found.positions))
    assert layers[-1].kept == [int(stay.sum(1).max())] * 2


def ragged() -> dict[str, Tensor]:
    """Two texts padded on the left, one of 8 image tokens in two places, one of 3."""
    ids = torch.randint(3, 55, (2, 16), generator=torch.Generator().manual_seed(4))
    ids[0, 2:7] = ids[0, 9:12] = IMAGE
    ids[1, 8:11] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_texts_with_different_images_in_a_padded_batch() -> None:
    model, inputs = reader(), ragged()
    with torch.no_grad(), regard.compress(model, ImageRank(budget=0.5)) as cache:
        model(**inputs)
    stay = expected(last_rows(model, inputs)[1], inputs, lambda number: math.ceil(number / 2))
    assert stay.sum(1).tolist() == [8 + 4, 9 + 2]
    for layer in cache.report().layers[2:]:
        assert torch.equal(layer.positions, stay[:, None].expand_as(layer.positions))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_in_a_batch_goes_on_as_alone(beams: int) -> None:
    model, inputs = reader(), ragged()
    alone = {key: value[1:, 4:] for key, value in inputs.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "suppress_tokens": [IMAGE]}
    with regard.compress(model, ImageRank(budget=2)):
        together = model.generate(**inputs, **options)
        single = model.generate(**alone, **options)
    assert torch.equal(together[1, 4:], single[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SEERS)
def test_the_whole_budget_changes_nothing(name: str, batch: int, options: dict[str, Any]) -> None:
    seer = SEERS[name]()
    inputs = seer.inputs if batch == 1 else pair(seer)
    plain = generate(seer, inputs, **options)
    for policy in (ImageRank(), ImageRank(budget=99), KeepAll()):
        with regard.compress(seer.model, policy):
            assert torch.equal(generate(seer, inputs, **options), plain)


def test_generating_sees_what_is_left() -> None:
    """The step after the prompt has the logits of an uncompressed one to which the dropped tokens are hidden."""
    seer, step = SEERS["llava"](), torch.tensor([[7]])
    with torch.no_grad(), regard.compress(seer.model, ImageRank(budget=3)) as cache:
        past = seer.model(**seer.inputs).past_key_values
        left = [layer.positions[0, 0] for layer in cache.report().layers]
        found = seer.model(step, past_key_values=past).logits
    hidden = [
        regard.Block(keys=(~stay).nonzero()[:, 0].tolist(), queries=[22], layers=layer)
        for stay, layer in zip(left, decoder_layers(seer.model), strict=True)
        if not stay.all()
    ]
    assert len(hidden) == 2
    with torch.no_grad(), regard.steer(seer.model, *hidden):
        past = seer.model(**seer.inputs).past_key_values
        whole = seer.model(step, past_key_values=past).logits
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-3)


SAID: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda ids: slice(2, 18),
    "positions": lambda ids: [*range(2, 18)],
    "mask": lambda ids: ids == IMAGE,
    "ImageTokens": lambda ids: ImageTokens((IMAGE,)),
    "function": lambda ids: lambda ids: ids == IMAGE,
}


@pytest.mark.parametrize("way", SAID)
def test_the_image_may_be_said(way: str) -> None:
    seer = SEERS["llava"]()
    inputs = seer.inputs if way in ("slice", "positions") else pair(seer)
    found = []
    for policy in (ImageRank(budget=4), ImageRank(budget=4, image=SAID[way](inputs["input_ids"]))):
        with regard.compress(seer.model, policy) as cache:
            generate(seer, inputs, num_beams=2)
        found.append(torch.stack([layer.positions for layer in cache.report().layers]))
    assert torch.equal(*found)
    assert str(policy).startswith("ImageRank(budget=4, image=")


def test_further_turns() -> None:
    """A turn without an image drops nothing; a second image is ranked by itself; what is left of the first stays."""
    model, past = reader(), hf.DynamicCache()
    one = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8]])
    with torch.no_grad(), regard.compress(model, ImageRank(budget=0.5)) as cache:
        model(one, past_key_values=past)
        first = cache.report().layers[2].positions[0, 0]
        model(torch.tensor([[9, 10, 11]]), past_key_values=past)
        assert torch.equal(cache.report().layers[2].positions[0, 0, :7], first)
        assert cache.report().layers[2].kept == [5 + 3] * 2
        model(torch.tensor([[12]]), past_key_values=past)
        model(torch.tensor([[13, IMAGE, IMAGE, 14]]), past_key_values=past)
        last = cache.report().layers
    assert [layer.kept for layer in last] == [[15, 15]] * 2 + [[5 + 3 + 1 + 3] * 2] * 2
    assert torch.equal(last[3].positions[0, 1, :7], first)
    assert last[3].positions[0, 0, 7:12].all()
    assert last[3].positions[0, 0, [12, 13]].sum() == 1


def test_policies_are_told_the_ids_of_each_beam() -> None:
    """At every step the ids are those that the first layer's keys, which depend on nothing else, were made of."""
    model, told = reader(), list[tuple[Tensor, Tensor]]()

    class Told(BudgetPolicy):
        def score(self, entries: Entries) -> Tensor:
            if entries.layer == 0:
                assert entries.token_ids is not None
                told.append((entries.token_ids, entries.keys))
            assert entries.token_ids is told[-1][0]
            return entries.positions.float()

    with regard.compress(model, Told(when=Every(1))):
        written = model.generate(**ragged(), max_new_tokens=6, do_sample=False, num_beams=3, suppress_tokens=[0])
    assert [ids.shape for ids, _ in told] == [(6, 16 + step) for step in range(6)]
    for ids, keys in told:
        positions = ((ids != 0).cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            fresh = model(ids, position_ids=positions).past_key_values.layers[0].keys
        real = (ids != 0)[:, None].expand(keys.shape[:3])
        torch.testing.assert_close(keys[real], fresh[real])
    assert any(not torch.equal(a[:, 16:], b[:, 16:-1]) for (a, _), (b, _) in pairwise(told))
    assert written.shape == (2, 22)


def test_ids_that_are_not_known() -> None:
    model, inputs = reader(), ragged()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    by_ids = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
    with torch.no_grad(), pytest.raises(ValueError, match=r"of 16 tokens none are known: the model was not given them"), \
            regard.compress(model, ImageRank(budget=2)):  # fmt: skip
        model(**by_ids)
    with torch.no_grad(), regard.compress(model, ImageRank(budget=2, image=inputs["input_ids"] == IMAGE)) as cache:
        model(**by_ids)
    assert cache.report().layers[3].positions.sum(2).tolist() == [[10, 10], [11, 11]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageRank(budget=0.0), r"above 0 and at most 1, got 0.0"),
        (lambda: ImageRank(layer=0), r"the first that drops, ranked by the one before: at least 1, got 0"),
        (lambda: ImageRank(layer=1.5), r"at least 1, got 1.5"),
        (lambda: ImageRank(budget=0), r"always keeps 1 entries, but the budget is 0"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_texts_and_models_without_images(llama: hf.PreTrainedModel) -> None:
    inputs = ragged()
    inputs["input_ids"][1, 8:11] = 5
    with torch.no_grad(), pytest.raises(ValueError, match=r"text 1 of the batch has none among its 12 tokens: pass"), \
            regard.compress(reader(), ImageRank(budget=2)) as cache:  # fmt: skip
        cache.model(**inputs)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM names no image token .*ImageTokens"), \
            regard.compress(llama, ImageRank(budget=2)):  # fmt: skip
        pass
    with torch.no_grad(), pytest.raises(ValueError, match=r"in the layers from 4 on, but the model has 4, 0 to 3"), \
            regard.compress(reader(), ImageRank(layer=4)) as cache:  # fmt: skip
        cache.model(**ragged())
    with torch.no_grad(), pytest.raises(ValueError, match="image is a mask for 3 texts"), \
            regard.compress(reader(), ImageRank(image=torch.ones(3, 16, dtype=torch.bool))) as cache:  # fmt: skip
        cache.model(**ragged())


def test_the_seers_are_as_before() -> None:
    seer: Seer = SEERS["qwen2-vl"]()
    before = {name: len(module._forward_pre_hooks) for name, module in seer.model.named_modules()}
    with regard.compress(seer.model, ImageRank(budget=4)):
        generate(seer, seer.inputs)
    assert before == {name: len(module._forward_pre_hooks) for name, module in seer.model.named_modules()}
