"""What each policy keeps, held to its rule on the stored matrix in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    Budget,
    BudgetPolicy,
    ByLayer,
    Entries,
    Every,
    Knorm,
    ObservedAttention,
    Policy,
    Pyramid,
    Random,
    SnapKV,
    StreamingLLM,
)
from tests.cache.conftest import decoder, texts
from tests.cache.reference import best, matrix, of_key_heads

LLAMA = decoder("llama")


def calls_of(model: hf.PreTrainedModel, run: Callable[[], Any]) -> list[list[tuple[Tensor, Tensor]]]:
    """Queries, and the keys of all tokens, of each layer and pass, of an uncompressed run."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        key = call.key[:, :: call.key.shape[1] // 2] if call.key.shape[1] > 2 else call.key
        found.setdefault(call.place.layer, []).append((call.query, key))
        return call

    with torch.no_grad(), regard.steer(model, regard.Custom(note)):
        run()
    return [found[layer] for layer in sorted(found)]


def kept_after_prompt(policy: Policy, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        LLAMA(**inputs)
    return [layer.positions for layer in cache.report().layers]


def share(budget: float) -> Callable[[int], int]:
    return lambda real: math.ceil(real * budget - 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(6, 40), min_size=1, max_size=3), st.sampled_from([0.3, 0.5, 0.75]), st.integers(0, 99))
def test_snapkv(lengths: list[int], budget: float, seed: int) -> None:
    inputs = texts(*lengths, seed=seed)
    real = inputs["attention_mask"].bool()
    window, pooling = 1 + seed % 2, ("mean", "max")[seed % 2]
    kept = kept_after_prompt(SnapKV(budget=budget, window=window, kernel=3, pooling=pooling), inputs)
    for layer, ((query, key),) in enumerate(calls_of(LLAMA, lambda: LLAMA(**inputs))):
        received = matrix(query[:, :, -window:], key, real).sum(2)
        received[..., -window:] = 0
        by_head = (avg_pool1d if pooling == "mean" else max_pool1d)(received, 3, stride=1, padding=1)
        pooled = of_key_heads(by_head, key.shape[1])  # after the pooling, as the authors have it
        pooled[..., -window:] = math.inf
        assert torch.equal(kept[layer], best(pooled, real, share(budget))), layer


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(6, 40), min_size=1, max_size=3), st.sampled_from([0.3, 0.5, 0.75]), st.booleans())
def test_observed_attention(lengths: list[int], budget: float, average: bool) -> None:
    inputs = texts(*lengths)
    real = inputs["attention_mask"].bool()
    kept = kept_after_prompt(ObservedAttention(budget=budget, recent=0.4, average=average), inputs)
    for layer, ((query, key),) in enumerate(calls_of(LLAMA, lambda: LLAMA(**inputs))):
        weights = matrix(query, key, real) * real[:, None, :, None]
        scores = of_key_heads(weights.sum(2), key.shape[1])
        if average:
            scores = scores / torch.arange(real.shape[1], 0, -1)
        for row, tokens in enumerate(real.sum(1).tolist()):
            recent = int(0.4 * share(budget)(tokens))
            scores[row, :, real.shape[1] - recent :] = math.inf
        assert torch.equal(kept[layer], best(scores, real, share(budget))), layer


@pytest.mark.parametrize("lengths", [(20,), (20, 9)])
def test_tova(lengths: tuple[int, ...]) -> None:
    inputs = texts(*lengths)
    real = inputs["attention_mask"].bool()
    kept = kept_after_prompt(TOVA(budget=0.4), inputs)
    for layer, ((query, key),) in enumerate(calls_of(LLAMA, lambda: LLAMA(**inputs))):
        scores = matrix(query[:, :, -1:], key, real)[:, :, 0].mean(1, keepdim=True).expand(-1, key.shape[1], -1)
        assert torch.equal(kept[layer], best(scores, real, share(0.4))), layer


@pytest.mark.parametrize("lengths", [(20,), (20, 9)])
def test_streaming_llm(lengths: tuple[int, ...]) -> None:
    inputs = texts(*lengths)
    real = inputs["attention_mask"].bool()
    for kept in kept_after_prompt(StreamingLLM(budget=6, sinks=2), inputs):
        for row, length in enumerate(lengths):
            first = 20 - length
            expected = [first, first + 1, 16, 17, 18, 19]
            assert kept[row].nonzero()[:, 1].tolist() == expected * 2
    assert real.shape == kept[:, 0].shape


def test_knorm() -> None:
    inputs = texts(20, 9)
    real = inputs["attention_mask"].bool()
    kept = kept_after_prompt(Knorm(budget=0.5), inputs)
    for layer, ((_, key),) in enumerate(calls_of(LLAMA, lambda: LLAMA(**inputs))):
        assert torch.equal(kept[layer], best(-key.double().norm(dim=-1), real, share(0.5)))


def test_decoding_goes_on_with_the_rule() -> None:
    """Of a policy that evicts at every step, entries and scores followed by hand through a whole generation."""
    inputs, steps = texts(12), 6
    for policy in (TOVA(budget=5), ObservedAttention(budget=5, recent=0.4), StreamingLLM(budget=5, sinks=1)):
        with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
            written = LLAMA.generate(**inputs, max_new_tokens=steps + 1, do_sample=False)
        kept = [layer.positions[0] for layer in cache.report().layers]
        # By hand: the model's own layers on the same tokens, each attending to what is left only.
        expected = by_hand(policy, written[:, :-1], prompt=12)
        for layer, positions in enumerate(kept):
            found = [row.nonzero()[:, 0].tolist() for row in positions]
            assert found == expected[layer], (policy, layer)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_last_query_is_read_alone_however_seldom_entries_are_dropped(prompt: bool) -> None:
    """What each entry receives from one query sums to 1 over a head's entries, and over three queries to 3."""
    read = []

    class Noting(TOVA):
        def score(self, entries: Entries) -> Tensor:
            read.append(entries.received.sum(dim=-1))
            return super().score(entries)

    with torch.no_grad(), regard.compress(LLAMA, Noting(budget=5, when=Every(3, prompt=prompt))):
        LLAMA.generate(**texts(12, 9), max_new_tokens=7, do_sample=False)
    assert len(read) == 3 * (2 + prompt)
    for received in read:
        torch.testing.assert_close(received, torch.ones(2, 2))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lengths", [(14,), (14, 9)])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_window_goes_on_while_decoding(pooling: str, lengths: tuple[int, ...], every: int) -> None:
    """SnapKV reads its last queries, of whatever pass, on the entries that are left: layer 0 by hand."""
    policy, steps = SnapKV(budget=8, window=4, kernel=3, pooling=pooling, when=Every(every)), 7
    inputs, ids = texts(*lengths), torch.arange(20, 20 + steps).expand(len(lengths), -1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = {"input_ids": torch.cat([inputs["input_ids"], ids], 1), "attention_mask": mask, "position_ids": places}
    (query, key), *_ = calls_of(LLAMA, lambda: LLAMA(**whole))[0]
    rows = [[[place for place in range(14) if mask[row, place]] for _ in range(2)] for row in range(len(lengths))]
    past: Any = None
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        for end in range(14, 14 + steps + 1):
            start = 0 if past is None else end - 1
            past = LLAMA(whole["input_ids"][:, start:end], attention_mask=mask[:, :end],
                         position_ids=places[:, start:end], past_key_values=past).past_key_values  # fmt: skip
            for row, heads in enumerate(rows):
                for head, entries in enumerate(heads):
                    entries += [end - 1] if start else []
                    if not start or not (end - 14) % every:
                        heads[head] = snapkv_by_hand(query[row], key[row], head, entries, end, pooling)
            found = cache.report().layers[0].positions
            assert [[head.nonzero()[:, 0].tolist() for head in row] for row in found] == rows, end


def snapkv_by_hand(query: Tensor, key: Tensor, head: int, entries: list[int], end: int, pooling: str) -> list[int]:
    """Which of a head's entries stay, by the last 4 queries before ``end``; two query heads share a key head."""
    places = torch.tensor(entries)
    queries = query[2 * head : 2 * head + 2, end - 4 : end].double()
    logits = queries @ key[head, places].double().T / math.sqrt(query.shape[-1])
    hidden = places > torch.arange(end - 4, end)[:, None]
    received = logits.masked_fill(hidden, -math.inf).softmax(-1).sum(1)
    received[:, places >= end - 4] = 0
    pool = avg_pool1d if pooling == "mean" else max_pool1d
    scores = pool(received, 3, stride=1, padding=1).mean(0)
    scores[places >= end - 4] = math.inf
    return sorted(places[scores.argsort(descending=True, stable=True)[:8]].tolist())


def test_a_short_turn_is_read_with_what_came_before_it() -> None:
    """A window of 4 queries over a turn of 2: the last 2 of the prompt are read too."""
    read = []

    class Noting(SnapKV):
        def score(self, entries: Entries) -> Tensor:
            read.append(entries.received.sum(dim=-1))
            return super().score(entries)

    with torch.no_grad(), regard.compress(LLAMA, Noting(budget=8, window=4)):
        past = LLAMA(**texts(12)).past_key_values
        LLAMA(**texts(2), past_key_values=past)
    assert len(read) == 6
    for received in read:
        torch.testing.assert_close(received, torch.full((1, 2), 4.0))


def test_a_window_that_was_steered_is_not_read_as_if_it_were_not() -> None:
    policy, edit = SnapKV(budget=8, window=4, when=Every(2)), regard.Reweight(keys=[3], by=4.0)
    with pytest.raises(NotImplementedError, match=r"queries of earlier passes.*choose when=AfterPrompt\(\)"), \
            regard.compress(LLAMA, policy), regard.steer(LLAMA, edit):  # fmt: skip
        LLAMA.generate(**texts(12), max_new_tokens=4, do_sample=False)


PADDED: tuple[Policy, ...] = (
    SnapKV(budget=10, window=4), SnapKV(budget=10, window=4, pooling="max"), TOVA(budget=10), TOVA(budget=0.4),
    StreamingLLM(budget=10), ObservedAttention(budget=10), ObservedAttention(budget=10, average=True),
    SnapKV(budget=Adaptive(10), window=4),
)  # fmt: skip


@pytest.mark.parametrize("policy", PADDED, ids=str)
def test_a_text_padded_on_the_right_is_compressed_as_alone(policy: Policy) -> None:
    inputs = {name: values.flip(1) for name, values in texts(40, 30).items()}
    together = kept_after_prompt(policy, inputs)
    alone = kept_after_prompt(policy, {name: values[1:, :30] for name, values in inputs.items()})
    for both, single in zip(together, alone, strict=True):
        assert torch.equal(both[1, :, :30], single[0])
        assert not both[1, :, 30:].any()


def by_hand(policy: Policy, ids: Tensor, prompt: int) -> list[list[list[int]]]:
    """The positions left in each layer and key head at the end: every pass run anew on a mask of what was left."""
    layers, heads = 3, 2
    left = [[list[int]() for _ in range(heads)] for _ in range(layers)]
    sums = torch.zeros(layers, heads, ids.shape[1], dtype=torch.float64)
    hidden: list[set[tuple[int, int, int]]] = []  # (layer, head, key) hidden from the query of a step

    def edit(call: regard.AttentionCall, chosen: Tensor) -> regard.AttentionCall:
        tokens = call.query.shape[2]
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(1, heads, 1, 1)
        for step, gone in enumerate(hidden):
            for layer, head, key in gone:
                if layer == call.place.layer and prompt + step < tokens:
                    visible[0, head, prompt + step, key] = False
        return regard.AttentionCall(call.query, call.key, call.value, visible.repeat_interleave(2, 1), enable_gqa=True)

    for end in range(prompt, ids.shape[1] + 1):
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def note(call: regard.AttentionCall, chosen: Tensor, found: Any = found) -> regard.AttentionCall:
            found[call.place.layer] = (call.query, call.key, call.attn_mask)
            return call

        with torch.no_grad(), regard.steer(LLAMA, regard.Custom(edit)), regard.steer(LLAMA, regard.Custom(note)):
            LLAMA(input_ids=ids[:, :end])
        gone = set()
        for layer, (query, key, visible) in found.items():
            logits = query.double() @ key.double().repeat_interleave(2, 1).mT / math.sqrt(query.shape[-1])
            rows = logits.masked_fill(~visible, -math.inf).softmax(-1)
            new = rows if end == prompt else rows[:, :, -1:]
            received = of_key_heads(new.sum(2), heads)[0]
            sums[layer, :, :end] += received
            last = of_key_heads(rows[:, :, -1], heads)[0].mean(0)
            for head in range(heads):
                entries = left[layer][head] + (list(range(prompt)) if end == prompt else [end - 1])
                scores = {
                    "TOVA": lambda key, last=last: float(last[key]),
                    "StreamingLLM": lambda key: math.inf if key < 1 else key,
                    "ObservedAttention": lambda key, layer=layer, head=head, end=end: (
                        math.inf if key >= end - 2 else float(sums[layer, head, key])
                    ),
                }[type(policy).__name__]
                left[layer][head] = sorted(sorted(entries, key=scores, reverse=True)[:5])
                gone |= {(layer, head, key) for key in range(end) if key not in left[layer][head]}
        hidden.append(gone)
    return left


def test_random_is_the_same_for_the_same_seed() -> None:
    inputs = texts(20)
    first, again, other = (kept_after_prompt(Random(budget=0.5, seed=seed), inputs) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(kept.sum(-1).eq(10).all() for kept in first)


def test_layers_share_in_a_pyramid() -> None:
    kept = kept_after_prompt(Knorm(budget=Pyramid(10)), texts(40))
    assert [int(k.sum()) for k in kept] == [2 * 20, 2 * 10, 2 * 1]
    kept = kept_after_prompt(Knorm(budget=Pyramid(0.8)), texts(40))
    assert [int(k.sum()) for k in kept] == [2 * 40, 2 * 32, 2 * 24]
    kept = kept_after_prompt(SnapKV(budget=Pyramid(12), window=8), texts(40))
    assert [int(k.sum()) for k in kept] == [2 * (8 + 8), 2 * (8 + 4), 2 * 8]
    kept = kept_after_prompt(Knorm(budget=ByLayer(10, [0.5, 1, 1.5])), texts(40))
    assert [int(k.sum()) for k in kept] == [2 * 5, 2 * 10, 2 * 15]


@pytest.mark.parametrize("budget", [40, 64, 128, 0.3])
@pytest.mark.parametrize("layers", [2, 31, 32])
def test_the_mean_of_a_pyramid_is_the_budget(layers: int, budget: int | float) -> None:
    """The window, which every layer keeps, and beyond it a ramp, as the authors of PyramidKV have it."""
    positions = torch.arange(500).expand(1, 1, -1)
    shares = []
    for layer in range(layers):
        entries = Entries(
            layer, layers, positions, positions, positions, positions >= 0, positions, None, 500, {}
        )  # fmt: skip
        shares.append(int(SnapKV(budget=Pyramid(budget), window=32).shares(entries)))
    assert sum(shares) == layers * (budget if isinstance(budget, int) else 150)
    assert shares == sorted(shares, reverse=True)
    further = sum(shares) / layers - 32
    assert abs(shares[0] - 32 - further * 1.95) <= 0.5
    assert abs(shares[-1] - 32 - further * 0.05) <= 0.5


class Falling(BudgetPolicy):
    """Scores that fall with the position, in the second head a hundred lower."""

    def score(self, entries: Entries) -> Tensor:
        return -(entries.positions + torch.tensor([0, 100])[None, :, None]).float()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Adaptive(10), [18, 2]),  # 0.8 · (20, 0) + 0.2 · (10, 10)
        (Adaptive(10, floor=0.5), [15, 5]),
        (Adaptive(10, floor=1), [10, 10]),
        (Adaptive(10, floor=0), [19, 1]),  # no head is left without an entry
        (Adaptive(10, floor=0, safeguard=0.35), [16, 4]),
        (Adaptive(3), [5, 1]),  # 5.4 and 0.6, of the sum 6
        (Adaptive(1), [1, 1]),
        (Adaptive(Pyramid(10)), [36, 4]),
    ],
    ids=str,
)
def test_heads_share_by_score(budget: Adaptive, expected: list[int]) -> None:
    """The layer's best entries over all heads, mixed with equal shares, as the authors of Ada-KV have it."""
    (kept, *_) = kept_after_prompt(Falling(budget=budget), texts(40))
    assert kept.sum(-1).tolist() == [expected]
    for head, number in enumerate(expected):
        assert kept[0, head, :number].all()


def test_shares_by_score_are_the_authors_as_far_as_rounding_goes() -> None:
    """Of any scores: how many of the best are a head's own, by a loop; what rounding leaves goes to some of the heads."""
    generator = torch.Generator().manual_seed(0)
    for floor in (0.0, 0.2, 0.7):
        scores, shares = torch.rand(3, 4, 50, generator=generator) ** 3, torch.tensor([9, 20, 1])[:, None].expand(-1, 4)
        found = Adaptive(0.5, floor=floor).of_heads(shares, scores)
        for row in range(3):
            share = int(shares[row, 0])
            best = sorted(((float(scores[row, h, j]), h) for h in range(4) for j in range(50)), reverse=True)[
                : 4 * share
            ]
            own = torch.tensor([sum(head == h for _, h in best) for head in range(4)], dtype=torch.float64)
            assert int(found[row].sum()) == 4 * share

            if own.min() * (1 - floor) + floor * share >= 1:
                exact = own * (1 - floor) + floor * share
                assert (found[row] >= (exact + 1e-9).floor()).all()


def test_what_a_head_has_too_few_entries_for_goes_to_others() -> None:
    """After an earlier choice: the first head has 2 entries left, less than the floor of 3."""
    scores = torch.tensor([[[5.0, 4, *[-math.inf] * 10], [3.0, 2, 1, 0, *[-1] * 8]]])
    assert Adaptive(6, floor=0.5).of_heads(torch.tensor([[6, 6]]), scores).tolist() == [[2, 10]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(budget=0.0), r"share of the tokens must be above 0 and at most 1, got 0.0"),
        (lambda: SnapKV(budget=1.5), r"above 0 and at most 1, got 1.5"),
        (lambda: SnapKV(budget=float("nan")), r"above 0 and at most 1, got nan"),
        (lambda: SnapKV(budget=16), r"SnapKV: always keeps 32 entries, but the budget is 16"),
        (lambda: SnapKV(budget="much"), r"a number of entries or a share of the tokens, got 'much'"),
        (lambda: StreamingLLM(budget=4), r"StreamingLLM: always keeps 5 entries, but the budget is 4"),
        (lambda: SnapKV(kernel=4), r"kernel must be odd"),
        (lambda: SnapKV(window=0), r"window must be at least 1"),
        (lambda: SnapKV(pooling="sum"), r'pooling must be "mean" or "max", got \'sum\''),
        (lambda: Every(0), r"Every: steps must be a number of decoding steps of at least 1, got 0"),
        (lambda: Every(1.5), r"at least 1, got 1.5"),
        (lambda: Knorm(when=4), r"Knorm: when must be such as AfterPrompt\(\) or Every\(16\), got 4"),
        (lambda: Knorm(rest="drop"), r"Knorm: rest must be such as Drop\(\) or Merge\(\), got 'drop'"),
        (lambda: SnapKV(budget=Pyramid(16)), r"SnapKV: always keeps 32 entries, but the budget is 16"),
        (lambda: Knorm(budget=Adaptive(Pyramid(2.0))), r"Pyramid: a share of the tokens must be .* got 2.0"),
        (lambda: Adaptive("much"), r"Adaptive: budget must be a number of entries or a share .* got 'much'"),
        (lambda: Adaptive(0.5, floor=2), r"Adaptive: floor must be a share from 0 to 1, got 2"),
        (lambda: Adaptive(0.5, safeguard=-1), r"Adaptive: safeguard must be a share from 0 to 1, got -1"),
        (lambda: Pyramid(0.5, beta=0.5), r"Pyramid: beta must be at least 1"),
        (lambda: Pyramid(Adaptive(0.5)), r"Pyramid: budget must be a number of entries or a share"),
        (lambda: ByLayer(0.5, []), r"ByLayer: factors must be numbers of at least 0, one for each layer, got \[\]"),
        (lambda: ByLayer(0.5, "cone"), r"got 'cone'"),
        (lambda: ByLayer(0.5, [1, -1]), r"got \[1, -1\]"),
        (lambda: ObservedAttention(recent=2), r"recent must be a share from 0 to 1, got 2"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "least"), [(SnapKV(budget=0.25, window=8), 8), (StreamingLLM(budget=0.25, sinks=5), 6)], ids=str
)
@pytest.mark.parametrize("budget", [0.25, Pyramid(0.25), Adaptive(Pyramid(0.25))], ids=str)
def test_a_text_too_short_for_the_policy_is_kept_whole(
    policy: BudgetPolicy, least: int, budget: float | Budget
) -> None:
    """A share of it would be less than the policy always keeps; longer ones of the batch are compressed all the same."""
    policy, lengths = replace(policy, budget=budget), (48, 4 * least - 4, 5)
    with torch.no_grad(), regard.compress(LLAMA, policy) as cache:
        LLAMA(**texts(*lengths))
    report = cache.report()
    kept = torch.stack([layer.positions.sum(dim=2) for layer in report.layers]).float().mean(dim=(0, 2))
    assert kept.tolist() == [12, lengths[1], 5]
    assert {layer.whole for layer in report.layers} == {2}
    assert "(2 texts are kept whole: the budget is less than the policy always keeps)" in str(report)


def test_a_short_text_is_compressed_once_it_is_long_enough() -> None:
    with torch.no_grad(), regard.compress(LLAMA, StreamingLLM(budget=0.5, sinks=2)) as cache:
        past, kept = LLAMA(**texts(4)).past_key_values, []
        for _ in range(5):
            kept.append((cache.report().layers[0].kept[0], cache.report().layers[0].whole))
            LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    assert kept == [(4, 1), (3, 0), (3, 0), (4, 0), (4, 0)]
    assert "kept whole" not in str(cache.report())


def test_factors_of_other_layers() -> None:
    with pytest.raises(ValueError, match=r"ByLayer: 2 factors were given, but the model has 3 layers"):
        kept_after_prompt(Knorm(budget=ByLayer(0.5, [1, 2])), texts(40))


def test_pooling_goes_by_the_text_while_decoding() -> None:
    """Of SnapKV at every step, the order of the entries: neighbours are those of the text."""
    with torch.no_grad(), regard.compress(LLAMA, SnapKV(budget=6, window=2, kernel=3, when=Every(1))):
        past = LLAMA(**texts(12)).past_key_values
        for token in range(5):
            LLAMA(torch.full((1, 1), 3 + token), past_key_values=past)
    for layer in past.layers:
        for group in layer.groups:
            positions = group.all_positions()
            assert torch.equal(positions, positions.sort(dim=-1).values)
            assert group.length == 6


def test_full_heads_are_not_copied_when_others_drop() -> None:
    class Uneven(BudgetPolicy):
        def score(self, entries: Entries) -> Tensor:
            return entries.positions.float()

        def counts(self, entries: Entries, scores: Tensor) -> Tensor:
            return torch.stack([entries.tokens, torch.full_like(entries.tokens, 5)], dim=1)

    with torch.no_grad(), regard.compress(LLAMA, Uneven(when=Every(1))) as cache:
        past = LLAMA(**texts(12)).past_key_values
        for _ in range(3):
            LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
            held = {group.heads[0]: group.keys.data_ptr() for group in past.layers[0].groups}
        LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    assert {group.heads[0]: group.keys.data_ptr() for group in past.layers[0].groups} == held
    assert cache.report().layers[0].kept == [16, 5]
    left = cache.report().layers[0].positions[0, 1]
    assert left.nonzero()[:, 0].tolist() == [11, 12, 13, 14, 15]


def test_what_was_made_in_inference_mode_is_not_written_into_outside() -> None:
    with regard.compress(LLAMA, StreamingLLM(budget=6)) as cache:
        with torch.inference_mode():
            past = LLAMA(**texts(12)).past_key_values
            LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
        with torch.no_grad():
            LLAMA(torch.ones(1, 1, dtype=torch.long), past_key_values=past)
    assert cache.report().layers[0].positions[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 12, 13]
