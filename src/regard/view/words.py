"""Join the pieces of a tokenizer so that they read as text again."""

import codecs
import re
from collections.abc import Sequence
from typing import Literal

import xarray as xr

from regard.tokens import Spelling

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_JOINING = "-/'\N{RIGHT SINGLE QUOTATION MARK}\N{EN DASH}\N{EM DASH}"
_CLOSING = ".,;:!?)]}%\N{HORIZONTAL ELLIPSIS}\N{RIGHT DOUBLE QUOTATION MARK}"
_OPENING = "([{$#\N{LEFT SINGLE QUOTATION MARK}\N{LEFT DOUBLE QUOTATION MARK}"


def pieces(dataset: xr.Dataset, batch: int, dim: Literal["query", "key"] = "key") -> list[str]:
    """The text of each key, or query, of an entry of the batch, as its tokens read; none if the dataset has no tokens.

    Example:
        >>> tokens = xr.DataArray([["A", "Ġparrot"]], dims=("batch", "key"))
        >>> pieces(xr.Dataset(coords={"key_token": tokens}), 0)
        ['A', ' parrot']
    """
    if f"{dim}_token" not in dataset.coords:
        return []
    tokens = dataset[f"{dim}_token"]
    return join([str(token) for token in tokens.isel(batch=batch).values], tokens.attrs.get("spelling"))


def join(tokens: Sequence[str], spelling: Spelling | None = None) -> list[str]:
    """Return one string for each token, with its leading space, that together read as the text.

    It knows the signs of byte-level BPE ("Ġthe", "Ċ"), SentencePiece ("▁the", "<0x0A>") and WordPiece
    ("##ing"); by those that occur, where the spelling is not given. Tokens with none of them are text already if any begins
    with a space, and words otherwise. A character whose bytes are spread over several tokens is given to the last of them.

    Example:
        >>> join(["the", "parrot", "##s", ",", "Mr", "."])
        ['the', ' parrot', 's', ',', ' Mr', '.']
        >>> join(["A", "Ġparrot", "Ċ"])
        ['A', ' parrot', '\\n']
    """
    spelling = spelling or _guess(tokens)
    if spelling == "byte-level":
        return _byte_level(tokens)
    if spelling == "SentencePiece":
        return _sentencepiece(tokens)
    if spelling is None and (any(token[:1].isspace() for token in tokens) or all(len(token) < 2 for token in tokens)):
        return list(tokens)
    return _words(tokens)


def _guess(tokens: Sequence[str]) -> Spelling | None:
    """By the signs that occur. Of a language without spaces they are bytes if, read as such, they are UTF-8."""
    if any(token.startswith(("Ġ", "Ċ")) for token in tokens):
        return "byte-level"
    if any(token.startswith("▁") or _BYTE.fullmatch(token) for token in tokens):
        return "SentencePiece"
    if all(token.isascii() for token in tokens):
        return None
    table = _byte_table()
    try:
        bytes(table[character] for token in tokens for character in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
    return "byte-level"


def _byte_level(tokens: Sequence[str]) -> list[str]:
    table = _byte_table()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = []
    for token in tokens:
        if all(character in table for character in token):
            pieces.append(decode(bytes(table[character] for character in token)))
        else:
            pieces.append(token)
    return pieces


def _byte_table() -> dict[str, int]:
    """Invert the table by which byte-level BPE writes each byte as a visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(256 + number): byte for number, byte in enumerate(hidden)}


def _sentencepiece(tokens: Sequence[str]) -> list[str]:
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = []
    for token in tokens:
        byte = _BYTE.fullmatch(token)
        pieces.append(decode(bytes([int(byte[1], 16)])) if byte else token.replace("▁", " "))
    return pieces


def _words(tokens: Sequence[str]) -> list[str]:
    pieces: list[str] = []
    glued, quoted = True, False
    for token in tokens:
        if token.startswith("##") and len(token) > 2:
            pieces.append(token[2:])
            glued = False
            continue
        closing = token in (*_CLOSING, *_JOINING) or (token == '"' and quoted)
        pieces.append(token if glued or closing or not token else " " + token)
        if token == '"':
            quoted = not quoted
        glued = token in (*_OPENING, *_JOINING) or (token == '"' and quoted)
    return pieces
