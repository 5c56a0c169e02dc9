"""Curves of hiding and showing against a model whose keys are masked by hand, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regard
from regard.explain import GenericRelevance, Rollout, faithfulness
from tests.explain.tiny import DIM, Kind, Tiny

close = torch.testing.assert_close


def squares(output: Tensor) -> Tensor:
    return output[:, -1].square().sum(-1)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 8), st.integers(1, 5), st.booleans(), st.booleans())
def test_curves(seed: int, batch: int, tokens: int, steps: int, causal: bool, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Tiny(Kind(causal=causal), seed)
    x = torch.randn(batch, tokens, DIM, dtype=torch.float64, generator=generator)
    scores = torch.randn(batch, tokens, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator) if padded else torch.full((batch,), tokens)
    real = torch.arange(tokens) >= tokens - lengths[:, None]
    found = faithfulness(
        model,
        {"x": x, "real": real if padded else None},
        scores,
        squares,
        steps=steps,
        token_mask=real if padded else None,
    )
    assert found.shares.tolist() == pytest.approx([step / steps for step in range(steps + 1)])
    for step in range(steps + 1):
        hidden, shown = real.clone(), real.clone()
        for text in range(batch):
            free = [token for token in range(tokens - 1) if real[text, token]]
            free.sort(key=lambda token: -float(scores[text, token]))
            first = round(step / steps * len(free))
            hidden[text, free[:first]] = False
            shown[text, free[first:]] = False
        with torch.no_grad():
            close(found.deletion[step], squares(model(x, hidden)))
            close(found.insertion[step], squares(model(x, shown)))


def test_both_ends_are_the_whole_text_and_what_is_kept() -> None:
    model, x = Tiny(Kind()), torch.randn(2, 6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = faithfulness(model, x, torch.rand(2, 6), squares, steps=3, keep=[0, -1])
    with torch.no_grad():
        kept = torch.zeros(2, 6, dtype=torch.bool)
        kept[:, [0, -1]] = True
        for curve, first, last in ((found.deletion, None, kept), (found.insertion, kept, None)):
            close(curve[0], squares(model(x, first)))
            close(curve[-1], squares(model(x, last)))


def test_measures_are_those_of_the_curves() -> None:
    model, x = Tiny(Kind()), torch.randn(2, 6, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = faithfulness(model, x, Rollout().explain(model, x), squares, steps=4)
    for curve, area in ((found.deletion, found.deletion_area), (found.insertion, found.insertion_area)):
        close(area, (curve[0] / 2 + curve[1] + curve[2] + curve[3] + curve[4] / 2) / 4)
    close(found.comprehensiveness, sum(found.deletion[0] - found.deletion[step] for step in range(1, 5)) / 4)
    close(found.sufficiency, sum(found.deletion[0] - found.insertion[step] for step in range(1, 5)) / 4)


def test_relevance_is_truer_than_chance_on_facts(mini: tuple[Any, Any]) -> None:
    """By more than two standard errors, on facts of the bundled model, whose answers it has from one place in the text."""
    model, tokenizer = mini
    metric = regard.logit_difference(*tokenizer.convert_tokens_to_ids(["8", "7"]))
    names = ["Ada", "Tom", "Eve", "Ann", "Sam", "Amy", "Ned", "Pip"]
    text = "The code of {0} is 48213. It rained. The code of {1} is 93055. The code of {0} is 4"
    written = [text.format(name, other) for name, other in zip(names, [*names[1:], names[0]], strict=True)]
    inputs = tokenizer(written, return_tensors="pt", padding=True, padding_side="left")
    mask = inputs["attention_mask"]
    relevance = GenericRelevance().explain(model, inputs, metric)
    chance = torch.rand(relevance.shape, generator=torch.Generator().manual_seed(0))
    true, by_chance = (
        faithfulness(model, inputs, scores, metric, steps=6, token_mask=mask) for scores in (relevance, chance)
    )
    for better in (by_chance.deletion_area - true.deletion_area, true.insertion_area - by_chance.insertion_area):
        assert better.mean() > 2 * better.std() / len(names) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": torch.zeros(6)}, r"scores must be numbers \(batch, tokens\), got shape \(6,\)"),
        ({"scores": torch.full((2, 6), torch.nan)}, r"scores must be numbers \(batch, tokens\), got NaN"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"token_mask": torch.ones(1, 6)}, r"token_mask has shape \(1, 6\), scores \(2, 6\)"),
        ({"metric": lambda output: output.sum()}, r"one number for each of the 2 texts, got shape \(\)"),
        ({"metric": lambda output: 1.0}, "one number for each of the 2 texts, got float"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"scores": torch.rand(2, 6), "metric": squares} | arguments
    with pytest.raises(ValueError, match=message):
        faithfulness(Tiny(Kind()), torch.randn(2, 6, DIM, dtype=torch.float64), **given)
