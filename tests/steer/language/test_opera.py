"""OPERA: penalty and rollback against the paper's rule on stored matrices, in greedy decoding and beam search."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import regard
from regard.steer.language import OverTrustPenalty, generate_with_rollback

SETTINGS = {"image": slice(2, 5), "candidates": 3, "scale": 30.0, "weight": 0.7, "unit": 1e-2, "warmup": 3}


def last_matrix(llama: LlamaForCausalLM, text: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the next token, and the last layer's matrix: the heads' maximum, rows of sum 1."""
    with torch.no_grad(), regard.watch(llama, keep_maps=True) as seen:
        logits = llama(input_ids=text).logits[0, -1]
    matrix = list(seen.maps.values())[-1][0].dense()[0].double().amax(0)
    return logits, matrix / matrix.sum(-1, keepdim=True)


def columns(matrix: Tensor, prompt: int, scale: float) -> Tensor:
    """The product down each column of the response's triangle."""
    response = scale * matrix[prompt:, prompt:]
    return torch.stack([response[column:, column].prod() for column in range(len(response))])


def candidates(
    llama: LlamaForCausalLM, text: Tensor, prompt: int, rejected: set[int], settings: dict[str, Any]
) -> tuple[dict[int, float], int]:
    """Each candidate's logit less its penalty, and the column that is the best for most."""
    logits, _ = last_matrix(llama, text)
    logits[list(rejected)] = -torch.inf
    found, best = {}, []
    for token in logits.topk(settings["candidates"]).indices.tolist():
        _, matrix = last_matrix(llama, torch.cat([text, torch.tensor([[token]])], 1))
        products = columns(matrix, prompt, settings["scale"])
        penalty = settings["unit"] * float(products.max())
        if len(products) <= settings["warmup"]:
            penalty = -float(matrix[-1, settings["image"]].sum())
        found[token] = float(logits[token]) - settings["weight"] * penalty
        best.append(int(products.argmax()))
    return found, int(torch.tensor(best).mode().values)


def test_columns_by_hand() -> None:
    """σ = 2: down the first column 2·½ times 2·¼ times 2·¾, down the second 2·¼ times 2·¼, and 2·0.05 in the third."""
    penalty = OverTrustPenalty(None, {"input_ids": torch.zeros(1, 1, dtype=torch.long)}, scale=2.0)
    rows = torch.tensor([[[0.5, 0.0], [0.25, 0.25]]], dtype=torch.float64)
    logs = penalty._carry(torch.zeros(1, 0, dtype=torch.float64), rows)
    torch.testing.assert_close(logs.exp(), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    logs = penalty._carry(logs, torch.tensor([[[0.75, 0.25, 0.05]]], dtype=torch.float64))
    torch.testing.assert_close(logs.exp(), torch.tensor([[0.75, 0.25, 0.1]], dtype=torch.float64))


def test_the_rule(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """A text with a response of 5 tokens, and of 1, where the image counts."""
    for length in (12, 8):
        text = ids[:, :length]
        wanted, _ = candidates(llama, text, 7, set(), SETTINGS)
        with torch.no_grad():
            scores = llama(input_ids=text).logits[:, -1]
        processed = OverTrustPenalty(llama, {"input_ids": ids[:, :7]}, **SETTINGS)(text, scores)
        lessened = torch.tensor(list(wanted.values())).log_softmax(-1)
        torch.testing.assert_close(processed[0, list(wanted)], lessened, atol=1e-4, rtol=1e-4)
        assert int(processed.isfinite().sum()) == 3


def test_generate(llama: LlamaForCausalLM, ids: Tensor) -> None:
    penalty = OverTrustPenalty(llama, {"input_ids": ids}, **SETTINGS)
    generated = llama.generate(ids, max_new_tokens=8, do_sample=False, logits_processor=[penalty])
    text = ids
    for _ in range(8):
        found, _ = candidates(llama, text, 12, set(), SETTINGS)
        text = torch.cat([text, torch.tensor([[max(found, key=found.__getitem__)]])], 1)
    assert torch.equal(generated, text)
    assert not torch.equal(generated, llama.generate(ids, max_new_tokens=8, do_sample=False))


class Checked:
    """The penalty, whose every step is held to one that has just begun and reads the text anew."""

    def __init__(self, model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self.penalty = OverTrustPenalty(model, inputs, **SETTINGS)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processed = self.penalty(input_ids, scores)
        anew = OverTrustPenalty(self.model, self.inputs, **SETTINGS)(input_ids, scores)
        torch.testing.assert_close(processed, anew, atol=1e-3, rtol=1e-4)
        return processed


def test_beams_change_places(llama: LlamaForCausalLM, ids: Tensor) -> None:
    inputs = {"input_ids": ids.view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    generated = llama.generate(**inputs, **arguments, logits_processor=[Checked(llama, inputs)])
    assert not torch.equal(generated, llama.generate(**inputs, **arguments))


def test_no_penalty_is_plain_decoding(llama: LlamaForCausalLM, ids: Tensor) -> None:
    """And steered decoding is, in a block around it."""
    penalty = OverTrustPenalty(llama, {"input_ids": ids}, weight=0)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    generated = llama.generate(ids, **arguments, logits_processor=[penalty])
    assert torch.equal(generated, llama.generate(ids, **arguments))
    with regard.steer(llama, regard.Reweight(keys=[2, 14], by=20)):
        steered = llama.generate(ids, **arguments)
    with regard.steer(llama, regard.Reweight(keys=[2, 14], by=20)):
        assert torch.equal(steered, llama.generate(ids, **arguments, logits_processor=[penalty]))
    assert not torch.equal(steered, generated)


def with_rollback(
    llama: LlamaForCausalLM, ids: Tensor, tokens: int, threshold: int, settings: dict[str, Any]
) -> tuple[Tensor, int]:
    """The paper's loop, every matrix anew; the number of rollbacks beside the text."""
    prompt, text, taken_back = ids.shape[1], ids, 0
    places: list[int] = []
    times: Counter[int] = Counter()
    rejected: dict[int, set[int]] = {}
    while text.shape[1] < prompt + tokens:
        at = text.shape[1] - prompt
        found, best = candidates(llama, text, prompt, rejected.get(at, set()), settings)
        places = [*places[:at], best]
        text = torch.cat([text, torch.tensor([[max(found, key=found.__getitem__)]])], 1)
        if best < settings["warmup"] or places.count(best) <= threshold:
            continue
        for place in (best + 1, best):
            if times[place] < settings["candidates"]:
                times[place] += 1
                taken_back += 1
                rejected = {of: tokens for of, tokens in rejected.items() if of <= place}
                rejected.setdefault(place, set()).add(int(text[0, prompt + place]))
                text, places = text[:, : prompt + place], places[:place]
                break
    return text, taken_back


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [2, 4])
def test_rollback(llama: LlamaForCausalLM, ids: Tensor, threshold: int, masked: bool) -> None:
    settings = SETTINGS | {"warmup": 1}
    inputs = {"input_ids": ids[:, :6]} | ({"attention_mask": torch.ones(1, 6, dtype=torch.long)} if masked else {})
    penalty = OverTrustPenalty(llama, inputs, threshold=threshold, **settings)
    generated = generate_with_rollback(llama, penalty, 12, do_sample=False)
    wanted, times = with_rollback(llama, ids[:, :6], 12, threshold, settings)
    assert times > 0
    assert torch.equal(generated, wanted)
    assert torch.equal(generate_with_rollback(llama, penalty, 12, do_sample=False), wanted)  # it begins anew


def test_what_a_rollback_leaves() -> None:
    penalty = OverTrustPenalty(None, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    penalty._places, penalty._rejected, penalty.rollback = torch.arange(6)[None], {1: {5}, 3: {6}, 4: {9}}, 3
    assert penalty.roll_back(torch.arange(10, 18)[None]).tolist() == [[10, 11, 12, 13, 14]]
    assert penalty._rejected == {1: {5}, 3: {6, 15}}
    assert penalty._places.tolist() == [[0, 1, 2]]
    assert penalty._times == {3: 1}
    assert penalty.rollback is None


def test_the_best_columns_go_with_their_beams(llama: LlamaForCausalLM, ids: Tensor) -> None:
    penalty = OverTrustPenalty(llama, {"input_ids": ids[:, :4]}, candidates=2)
    beams = torch.cat([ids[:, :4].repeat(2, 1), torch.tensor([[5], [6]])], dim=1)
    scores = torch.zeros(2, 61)
    scores[:, [20, 30]] = 1.0
    penalty(beams, scores)
    penalty._places = torch.tensor([[7], [8]])
    penalty(torch.cat([beams[[1, 1]], torch.tensor([[20], [30]])], dim=1), scores)
    assert penalty._places[:, 0].tolist() == [8, 8]


def test_errors(llama: LlamaForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs input_ids of shape .* got inputs pixel_values"):
        OverTrustPenalty(llama, {"pixel_values": ids})
    with pytest.raises(ValueError, match=r"at least 2; got 1"):
        OverTrustPenalty(llama, {"input_ids": ids}, candidates=1)
    penalty = OverTrustPenalty(llama, {"input_ids": ids})
    with pytest.raises(ValueError, match="nothing to roll back in 1 texts"):
        penalty.roll_back(ids)
    with pytest.raises(ValueError, match="got 1 texts and num_beams=2"):
        generate_with_rollback(llama, penalty, 5, num_beams=2)
