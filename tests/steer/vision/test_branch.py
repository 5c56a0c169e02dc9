"""A second run beside ``generate`` sees what the first sees."""

import pytest
import torch
from torch import Tensor

import regard
from regard.steer.vision import gift, vif
from regard.steer.vision._branch import Branch, plausible
from regard.tokens import decoder_layers
from tests.steer.vision.conftest import WORDS, Seer


def test_the_same_inputs_give_the_same_scores(seer: Seer) -> None:
    branch, seen = Branch(seer.model, seer.inputs), []

    def compare(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(float((branch(input_ids) - scores)[:, :WORDS].abs().max()))
        return scores

    for _ in range(2):  # the same prompt again
        seer.generate(logits_processor=[compare])
    assert len(seen) == 8
    assert max(seen) < 1e-4


def test_a_steered_model_is_steered_in_both_runs(seer: Seer) -> None:
    """And neither run disturbs the other's place in its text."""
    branch, seen = Branch(seer.model, seer.inputs), []

    def compare(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(float((branch(input_ids) - scores)[:, :WORDS].abs().max()))
        return scores

    layers = decoder_layers(seer.model)
    edits = [
        regard.Block(keys=[3, 20, 23], layers=layers),
        gift(seer.model, seer.inputs),
        *vif(seer.model, seer.inputs),
    ]
    with regard.steer(seer.model, *edits):
        plain = seer.scores()
    with regard.steer(seer.model, *edits):
        torch.testing.assert_close(seer.scores(logits_processor=[compare]), plain, atol=1e-4, rtol=1e-4)
    assert max(seen) < 1e-4


def test_what_is_not_plausible_is_ruled_out() -> None:
    original = torch.tensor([[0.5, 0.4, 0.06, 0.04]]).log()
    assert plausible(torch.ones(1, 4), original, 0.1).tolist() == [[1.0, 1.0, 1.0, -torch.inf]]


def test_another_prompt(seer: Seer) -> None:
    branch = Branch(seer.model, seer.inputs)
    with pytest.raises(ValueError, match=r"a prompt of shape \(1, 22\) got a text of shape \(2, 30\)"):
        branch(torch.ones(2, 30, dtype=torch.long))
