"""How a tokenizer writes its tokens."""

from typing import Any, Literal

Spelling = Literal["byte-level", "SentencePiece", "WordPiece"]
"""Bytes as visible characters, with Ġ for a space; ▁ for a space; ## for what goes on with a word."""

_PROBES: tuple[tuple[Spelling, str, str], ...] = (
    ("byte-level", "Ġb", "a b"),
    ("SentencePiece", "▁b", "a b"),
    ("WordPiece", "##b", "ab"),
)


def spelling_of(tokenizer: Any) -> Spelling | None:
    """How a tokenizer of transformers writes tokens, by how it joins two of each kind; None if it is none of these.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> spelling_of(tokenizer)
    'byte-level'
    """
    for name, token, joined in _PROBES:
        if tokenizer.convert_tokens_to_string(["a", token]) == joined:
            return name
    return None
