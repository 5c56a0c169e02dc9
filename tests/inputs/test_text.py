"""Pairs of texts: which is which, and what goes from one to the other."""

import numpy as np
import pytest
import torch

from regard.inputs import read_pair
from regard.look import look
from regard.view.segments import between
from tests.inputs.models import bert

FIRST, SECOND = "the cat slept all day", "it rained"


def test_two_texts_stand_between_special_tokens() -> None:
    model, tokenizer = bert()
    reading = read_pair(model, tokenizer, FIRST, SECOND)
    tokens = reading.parts[0].keys
    assert " ".join(tokens.names) == f"<s> {FIRST} </s> {SECOND} </s>"
    assert {name: list(positions) for name, positions in tokens.segments.items()} == {
        "first text": [1, 2, 3, 4, 5],
        "second text": [7, 8],
    }
    assert tokens.special.nonzero()[:, 0].tolist() == [0, 6, 9]
    assert reading.inputs["token_type_ids"].tolist() == [[0] * 7 + [1] * 3]


def test_what_goes_from_one_text_to_the_other() -> None:
    model, tokenizer = bert()
    seen = look(model, tokenizer, FIRST, pair=SECOND)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stored = model(**tokenizer(FIRST, SECOND, return_tensors="pt"), output_attentions=True).attentions
    shares = between(seen.dataset)
    assert list(shares) == ["first text → second text", "second text → first text"]
    first, second = slice(1, 6), slice(7, 9)
    for layer, matrix in enumerate(stored):
        dense = matrix[0].double().numpy()
        forth = dense[:, first, second].sum(-1).mean(-1)
        back = dense[:, second, first].sum(-1).mean(-1)
        np.testing.assert_allclose(shares["first text → second text"][layer], forth, atol=1e-5)
        np.testing.assert_allclose(shares["second text → first text"][layer], back, atol=1e-5)


def test_the_longer_text_is_shortened() -> None:
    (part,) = read_pair(*bert(), FIRST, SECOND, max_tokens=8).parts
    assert " ".join(part.keys.names) == "<s> the cat slept </s> it rained </s>"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ((" ", "it"), {}, "the first text is empty"),
        (("it", ""), {}, "the second text is empty"),
        (
            ("cat " * 80, "it"),
            {},
            r"the two texts have 84 tokens together, but the model has positions for 64; pass --max",
        ),
    ],
)
def test_pairs_that_cannot_be_read(texts: tuple[str, str], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        look(*bert(), texts[0], pair=texts[1], **options)
