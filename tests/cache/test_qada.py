"""Who is local at each step, held to the criterion in float64, and that local heads attend to local entries only."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
from regard.cache import Knorm, QAdA, Step
from tests.cache.conftest import DECODERS, decoder, texts

SMALL: dict[str, Any] = {"sinks": 2, "recent": 4, "threshold": 0.3}


def sharp(name: str) -> hf.PreTrainedModel:
    """A model whose queries are long, so that what a head should read depends on them."""
    model = decoder(name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "q_norm" in path:
                parameter.add_(3)
            elif "c_attn" in path or ("q_proj" in path and name in ("llama", "mistral")):
                parameter.mul_(4 if name == "gpt2" else 10)
    return model


@pytest.fixture
def llama() -> hf.PreTrainedModel:
    return sharp("llama")


@dataclass
class Seen:
    """One layer's call in one step, as an editor sees it: on all keys, some hidden by the mask."""

    layer: int
    query: Tensor
    key: Tensor
    hidden: Tensor
    scale: float


@contextlib.contextmanager
def steps_of(model: hf.PreTrainedModel, mask: Tensor) -> Iterator[list[Seen]]:
    """The decoding steps' calls; ``mask`` tells tokens of the prompt from padding."""
    seen: list[Seen] = []

    def note(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        if call.query.shape[2] == 1 and call.key.shape[2] > mask.shape[1]:  # which those of a sliding window are not
            batch, tokens = call.key.shape[0], call.key.shape[2]
            visible = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if call.attn_mask is None else call.attn_mask
            visible = visible if visible.dtype == torch.bool else visible > -1e30
            real = torch.ones(batch, tokens, dtype=torch.bool)
            real[:, : mask.shape[1]] = mask.repeat_interleave(batch // len(mask), 0).bool()
            hidden = real[:, None] & ~visible[:, :, 0].expand(batch, call.query.shape[1], -1)
            seen.append(Seen(call.place.layer, call.query, call.key, hidden, call.factor))
        return call

    with regard.steer(model, regard.Custom(note)):
        yield seen


def margin(policy: QAdA, step: Seen, row: int, head: int, first: int) -> float:
    """log A_local − log A_far − log(threshold / (1 − threshold)) of one head of one text, from the definition."""
    key_head = head * step.key.shape[1] // step.query.shape[1]
    query, keys = step.query[row, head, 0].double() * step.scale, step.key[row, key_head].double()
    tokens = len(keys)
    local = [j for j in range(first, tokens) if j < first + policy.sinks or j >= tokens - policy.recent]
    far = [j for j in range(first, tokens) if j not in local]
    if not far:
        return math.inf
    mean, covariance = keys[far].mean(0), torch.cov(keys[far].T, correction=0)
    log_local = torch.logsumexp(keys[local] @ query, 0)
    log_far = math.log(len(far)) + query @ mean + query @ covariance @ query / 2
    return float(log_local - log_far) - math.log(policy.threshold / (1 - policy.threshold))


def generate(model: hf.PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 10, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [(12,), (14, 9, 2)], ids=["one", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_decisions(name: str, lengths: tuple[int, ...], beams: int) -> None:
    """Of every step, layer and head; keys that move out of the window count among the far ones, on each beam its own."""
    model, inputs, policy = sharp(name), texts(*lengths), QAdA(**SMALL)
    with regard.compress(model, policy), steps_of(model, inputs["attention_mask"]) as steps:
        generate(model, inputs, num_beams=beams)
    found = []
    for step in steps:
        tokens = step.key.shape[2]
        for row in range(len(step.key)):
            first = max(lengths) - lengths[row // beams]
            far = torch.zeros(tokens, dtype=torch.bool)
            far[first + policy.sinks : tokens - policy.recent] = True
            for head in range(step.query.shape[1]):
                expected = margin(policy, step, row, head, first)
                if abs(expected) < 1e-3:
                    continue  # as good as equal
                assert torch.equal(step.hidden[row, head], far & (expected > 0)), (step.layer, row, head, tokens)
                found.append(expected > 0)
    assert 0.15 < sum(found) / len(found) < 0.85


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [(12,), (14, 9, 2)], ids=["one", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_local_heads_attend_to_local_entries(name: str, lengths: tuple[int, ...], beams: int) -> None:
    """The output on slices of the cache is that on all of it with the far entries masked, which an editor is shown."""
    model, inputs, policy = sharp(name), texts(*lengths), QAdA(**SMALL)
    with regard.compress(model, policy):
        plain = generate(model, inputs, num_beams=beams)
    with regard.compress(model, policy), steps_of(model, inputs["attention_mask"]) as steps:
        masked = generate(model, inputs, num_beams=beams)
    assert any(step.hidden.any() for step in steps)
    assert torch.equal(plain.sequences, masked.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(masked.logits), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths", [(12,), (12, 5)], ids=["one", "padded"])
def test_a_step_is_that_of_the_whole_text_with_the_same_entries_hidden(
    llama: hf.PreTrainedModel, lengths: tuple[int, ...]
) -> None:
    inputs, policy = texts(*lengths), QAdA(**SMALL)
    with regard.compress(llama, policy):
        plain = generate(llama, inputs)
    with regard.compress(llama, policy), steps_of(llama, inputs["attention_mask"]) as steps:
        generate(llama, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), 10, dtype=torch.long)], 1)
    visible = mask.bool()[:, None, None] & torch.ones(22, 22, dtype=torch.bool).tril()
    hidden = torch.zeros(3, len(lengths), 4, 22, 22, dtype=torch.bool)
    for step in steps:
        tokens = step.key.shape[2]
        hidden[step.layer, :, :, tokens - 1, :tokens] = step.hidden

    def hide(call: regard.AttentionCall, heads: Tensor) -> regard.AttentionCall:
        return regard.AttentionCall(
            call.query, call.key, call.value, visible & ~hidden[call.place.layer], enable_gqa=True
        )

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), regard.steer(llama, regard.Custom(hide)):
        whole = llama(plain.sequences, attention_mask=mask, position_ids=positions).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(plain.logits, 1), whole, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_text_in_a_padded_batch_is_as_alone(name: str) -> None:
    model, both, policy = sharp(name), texts(14, 9), QAdA(**SMALL)
    alone = {key: value[1:, 5:] for key, value in both.items()}
    with regard.compress(model, policy):
        together = torch.stack(generate(model, both).logits)[:, 1]
    with regard.compress(model, policy):
        single = torch.stack(generate(model, alone).logits)[:, 0]
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_threshold_of_one_changes_nothing_and_of_zero_is_local(name: str) -> None:
    model, inputs = sharp(name), texts(14, 9)
    plain = generate(model, inputs)
    never, too_short = QAdA(**SMALL | {"threshold": 1.0}), QAdA(threshold=0.0)  # this one for any far entries
    for policy in (never, too_short):
        with regard.compress(model, policy):
            same = generate(model, inputs)
        torch.testing.assert_close(torch.stack(same.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
    with regard.compress(model, QAdA(**SMALL | {"threshold": 0.0})), steps_of(model, inputs["attention_mask"]) as steps:
        generate(model, inputs)
    for step in steps:
        tokens = step.key.shape[2]
        assert step.hidden.sum(-1).tolist() == [[tokens - 6] * 4, [tokens - 5 - 6] * 4]


def test_several_turns_on_one_cache(llama: hf.PreTrainedModel) -> None:
    """A further turn is read in full, and its keys are among the far ones afterwards; another block begins anew."""
    past = hf.DynamicCache(config=llama.config)
    turns = [texts(12)["input_ids"], *(torch.full((1, 1), n) for n in (5, 6)), texts(7, seed=1)["input_ids"]]
    turns += [torch.full((1, 1), n) for n in (7, 8, 9)]
    for policy, given in ((QAdA(**SMALL), turns), (QAdA(**SMALL | {"sinks": 0, "recent": 5}), turns[-1:])):
        with torch.no_grad(), regard.compress(llama, policy), steps_of(llama, torch.ones(1, 1)) as steps:
            for turn in given:
                llama(turn, past_key_values=past)
        assert len(steps) == 3 * sum(turn.shape[1] == 1 for turn in given)
        for step in steps:
            number = step.key.shape[2] - policy.sinks - policy.recent
            for head in range(4):
                expected = margin(policy, step, 0, head, 0)
                assert int(step.hidden[0, head].sum()) == (number if expected > 0 else 0)


def test_watching_sees_what_is_read(llama: hf.PreTrainedModel) -> None:
    policy, inputs = QAdA(**SMALL), texts(14)
    with regard.compress(llama, policy):
        plain = generate(llama, inputs)
    with regard.compress(llama, policy), regard.watch(llama, regard.Rows([15])) as seen:
        watched = generate(llama, inputs)
    torch.testing.assert_close(torch.stack(watched.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-3)
    with regard.compress(llama, policy), steps_of(llama, inputs["attention_mask"]) as steps:
        generate(llama, inputs)
    rows = torch.as_tensor(seen.dataset().rows.values)[:, 0, :, 0]  # (layer, head, key)
    hidden = torch.stack([step.hidden[0] for step in steps if step.key.shape[2] == 16])
    assert hidden.any()
    assert torch.equal(rows[..., :16] == 0, hidden)


def test_in_half_precision(llama: hf.PreTrainedModel) -> None:
    """Local logits and moments are computed in float32, whatever the model's precision."""
    model, inputs = llama.to(torch.bfloat16), texts(14, 9)
    seen: list[Step] = []

    class Noting(QAdA):
        def is_local(self, step: Step) -> Tensor:
            seen.append(step)
            return super().is_local(step)

    with regard.compress(model, Noting(**SMALL)):
        logits = generate(model, inputs).logits
    assert {(step.mass.dtype, step.keys.dtype) for step in seen} == {(torch.float32, torch.bfloat16)}
    assert all(state.dtype in (torch.float32, torch.int64) for step in seen for state in step.state.values())
    with regard.compress(model, QAdA(**SMALL)), steps_of(model, inputs["attention_mask"]):
        masked = generate(model, inputs).logits
    torch.testing.assert_close(logits[1], masked[1], atol=0.3, rtol=0.1)


def test_the_report_says_that_nothing_is_freed(llama: hf.PreTrainedModel) -> None:
    with regard.compress(llama, QAdA(**SMALL)) as cache:
        generate(llama, texts(14))
    assert cache.report().kept == 1.0
    assert "entries that are not attended to stay in memory" in str(cache.report())


def test_a_cache_that_another_policy_compressed(llama: hf.PreTrainedModel) -> None:
    past, token = hf.DynamicCache(config=llama.config), torch.full((1, 1), 5)
    with torch.no_grad(), regard.compress(llama, Knorm(budget=0.6)):
        llama(texts(20)["input_ids"], past_key_values=past)
    message = r"QAdA chooses among all entries, but another policy dropped some of this cache; begin a new cache"
    with torch.no_grad(), pytest.raises(ValueError, match=message), regard.compress(llama, QAdA(**SMALL)):
        llama(token, past_key_values=past)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, r"QAdA: threshold must be a share from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, r"QAdA: threshold must be a share from 0 to 1, got nan"),
        ({"sinks": -1}, r"sinks must be at least 0 and recent at least 1, got sinks=-1, recent=1024"),
        ({"recent": 0}, r"sinks must be at least 0 and recent at least 1, got sinks=16, recent=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QAdA(**arguments)


def test_padding_on_the_right_is_refused() -> None:
    """Its last tokens are not the text's."""
    model, inputs = decoder("llama"), {name: values.flip(1) for name, values in texts(12, 9).items()}
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad(), regard.compress(model, QAdA(sinks=1, recent=3)):
        past = model(**inputs).past_key_values
        with pytest.raises(ValueError, match=r"padded on the right: pad it on the left"):
            model(mask[:, :1], attention_mask=mask, past_key_values=past)
