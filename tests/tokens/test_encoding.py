"""Texts become exactly the tokens that were asked for."""

from typing import Any

import pytest
from torch.nn import Module

from regard import demo
from regard.tokens import encode, max_positions

TEXT = demo.text()


@pytest.fixture(params=["mini", "minilm"])
def read(request: pytest.FixtureRequest) -> tuple[Module, Any]:
    """A decoder with one special token before a text, and an encoder with one on each side."""
    return request.getfixturevalue(request.param)


def ids_of(encoded: Any) -> list[int]:
    return encoded.inputs["input_ids"][0].tolist()


def test_a_text_is_what_the_tokenizer_makes_of_it(read: tuple[Module, Any]) -> None:
    model, tokenizer = read
    (encoded,) = encode(model, tokenizer, "It rained all day.")
    whole = tokenizer("It rained all day.", return_special_tokens_mask=True)
    assert ids_of(encoded) == whole["input_ids"]
    assert encoded.inputs["attention_mask"].tolist() == [whole["attention_mask"]]
    assert encoded.special.int().tolist() == whole["special_tokens_mask"]


@pytest.mark.parametrize("tokens", [3, 4, 17, 100])
def test_as_many_tokens_as_asked_for(read: tuple[Module, Any], tokens: int) -> None:
    model, tokenizer = read
    text = "Ünïcode 48213: 你好, " + TEXT  # which tokens of several bytes, cut and read again, would lengthen
    (encoded,) = encode(model, tokenizer, text, max_tokens=tokens)
    assert len(ids_of(encoded)) == tokens
    assert ids_of(encoded) == tokenizer(text, truncation=True, max_length=tokens)["input_ids"]


def test_no_more_tokens_than_there_are(read: tuple[Module, Any]) -> None:
    (encoded,) = encode(*read, "It rained.", max_tokens=500)
    assert ids_of(encoded) == read[1]("It rained.")["input_ids"]


@pytest.mark.parametrize("tokens", [None, 1500, 1024, 1025])
def test_windows_hold_the_text_once(read: tuple[Module, Any], tokens: int | None) -> None:
    model, tokenizer = read
    text, limit = " ".join([TEXT] * 3), max_positions(*read)
    windows = encode(model, tokenizer, text, window=True, max_tokens=tokens)
    content = [token for window in windows for token in window.inputs["input_ids"][0][~window.special].tolist()]
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert content == plain[: len(content)]
    lengths = [len(window.special) for window in windows]
    assert lengths[:-1] == [limit] * (len(windows) - 1)
    if tokens is None:
        assert content == plain
    else:  # one token does not make a window with special ones around it
        assert sum(lengths) == (tokens if tokens % limit != 1 else tokens - 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" \n", {}, "the text is empty"),
        ("a\ud800b", {}, r"the text holds '\\ud800' at character 1, half of a surrogate pair"),
        ("Ada", {"max_tokens": 1}, r"max_tokens is 1, but the tokenizer puts \d special tokens around every text"),
        ("word " * 1200, {}, r"but the model has positions for [\d,]+; pass --window to read it in windows of"),
        ("Ada", {"room": 5000}, r"and 5000 are to be written, but the model has positions for"),
    ],
)
def test_texts_that_cannot_be_read(read: tuple[Module, Any], text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(*read, text, **options)


def test_nul_is_a_character(mini: tuple[Module, Any]) -> None:
    (encoded,) = encode(*mini, "a\0b")
    assert mini[1].decode(ids_of(encoded)[1:]) == "a\0b"
