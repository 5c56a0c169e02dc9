"""Passages of a text, and the positions of their tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal, TypeVar, overload

Offsets = Sequence[tuple[int, int]]
Occurrence = int | Literal["all"] | None

_T = TypeVar("_T")


@overload
def locate(what: str, text: str, tokenizer: Any, occurrence: Occurrence = None) -> list[int]: ...
@overload
def locate(what: str, text: Sequence[str], tokenizer: Any, occurrence: Occurrence = None) -> list[list[int]]: ...
@overload
def locate(
    what: Mapping[str, Any], text: str | Sequence[str], tokenizer: Any, occurrence: Occurrence = None
) -> dict[str, Any]: ...
@overload
def locate(what: _T, text: str | Sequence[str], tokenizer: Any, occurrence: Occurrence = None) -> _T: ...
def locate(what: Any, text: str | Sequence[str], tokenizer: Any, occurrence: Occurrence = None) -> Any:
    """Positions of a passage's tokens; or an edit or a statistic with every passage that it names replaced by them.

    Args:
        what: a passage; a mapping from names to passages and positions, such as the segments of ``Mass``; or an object that
            says with ``places`` which of its arguments are positions, as edits do. What is no passage stays as it is.
        text: as the model will read it; or several, for positions in the batch padded to the longest, which are lists, one
            for each text.
        tokenizer: a fast tokenizer, to be called on the text; or what it returned for it, where it was called in another
            way: with padding to a length, truncation, or without special tokens after a chat template.
        occurrence: of a passage that occurs several times the number, from 0 or negative from the last, or "all";
            None where it has to occur once.

    Raises:
        ValueError: a passage that does not occur, or more than once without ``occurrence``, or of which truncation left
            no token; a tokenizer that does not tell where in the text its tokens stand.
        IndexError: an occurrence that is not there.

    >>> import regard
    >>> _, tokenizer = regard.mini()
    >>> locate(regard.Reweight(keys="is 48", by=2), "The code is 48.", tokenizer)
    Reweight(keys=[5, 6, 7, 8], by=2)
    >>> locate("Ada", ["Hello Ada.", "They say that Ada slept."], tokenizer)
    [[6, 7], [4, 5]]
    """
    if isinstance(what, str):
        return _Texts(text, tokenizer).find(what, occurrence)
    if isinstance(what, Mapping):
        named = {name: passage for name, passage in what.items() if isinstance(passage, str)}
        texts = _Texts(text, tokenizer) if named else None
        found = {name: texts.find(passage, occurrence) for name, passage in named.items()} if texts else {}
        return {**what, **found}
    places = getattr(what, "places", None)
    if places is None:
        raise TypeError(
            f"locate needs a passage, a mapping from names to passages, an edit or a statistic, got {type(what).__name__}"
        )
    given = {name: getattr(what, name, None) for name in places}
    located = {
        name: locate(value, text, tokenizer, occurrence)
        for name, value in given.items()
        if isinstance(value, str) or (isinstance(value, Mapping) and any(isinstance(of, str) for of in value.values()))
    }
    return _with(what, located) if located else what


class _Texts:
    """Texts, and where in them the tokens stand that a tokenizer makes of them."""

    def __init__(self, text: str | Sequence[str], tokenizer: Any) -> None:
        self._single = isinstance(text, str)
        self._texts = [text] if isinstance(text, str) else list(text)
        if not self._texts:
            raise ValueError("there is no text to locate anything in")
        self._offsets = _offsets(self._texts, tokenizer)

    def find(self, passage: str, occurrence: Occurrence) -> list[int] | list[list[int]]:
        """Positions of the passage's tokens, a list for each text where several were given."""
        rows = [
            _tokens(passage, text, offsets, occurrence, "the text" if self._single else f"text {number}")
            for number, (text, offsets) in enumerate(zip(self._texts, self._offsets, strict=True))
        ]
        return rows[0] if self._single else rows


def _offsets(texts: list[str], tokenizer: Any) -> list[Offsets]:
    """Of each text the characters of each token, first and behind the last, for tokens without characters the same."""
    encoded = tokenizer
    if not hasattr(tokenizer, "encodings"):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"locate needs a fast tokenizer, which tells where its tokens stand; got {tokenizer!r:.80}"
            )
        encoded = tokenizer(texts, padding=len(texts) > 1, verbose=False)
    encodings = encoded.encodings
    if not encodings:
        raise ValueError("locate needs what a fast tokenizer returned, which tells where its tokens stand")
    if len(encodings) != len(texts):
        raise ValueError(f"{len(encodings)} texts were tokenized, but {len(texts)} are given")
    return [encoding.offsets for encoding in encodings]


def _tokens(passage: str, text: str, offsets: Offsets, occurrence: Occurrence, where: str) -> list[int]:
    starts = _chosen(passage, _occurrences(passage, text), occurrence, where)
    spans = [(start, start + len(passage)) for start in starts]
    end = max(last for _, last in offsets) if offsets else 0
    for start, stop in spans:
        if text[max(start, end) : stop].strip():
            raise ValueError(f"the passage {passage!r} is cut off: the tokens end at character {end} of {where}")
    found = [
        number
        for number, (first, last) in enumerate(offsets)
        if any(first < stop and last > start for start, stop in spans)
    ]
    if not found:
        raise ValueError(f"no token stands for the passage {passage!r} of {where}")
    return found


def _occurrences(passage: str, text: str) -> list[int]:
    """The characters at which the passage begins; two occurrences may overlap."""
    starts: list[int] = []
    start = text.find(passage) if passage else -1
    while start >= 0:
        starts.append(start)
        start = text.find(passage, start + 1)
    return starts


def _chosen(passage: str, starts: list[int], occurrence: Occurrence, where: str) -> list[int]:
    if not starts:
        raise ValueError(f"the passage {passage!r} does not occur in {where}; name one that does, or give positions")
    shown = ", ".join(map(str, starts[:3])) + (", …" if len(starts) > 3 else "")
    several = f"the passage {passage!r} occurs {len(starts)} times, at characters {shown} in {where}"
    if occurrence == "all":
        return starts
    if occurrence is None:
        if len(starts) > 1:
            raise ValueError(f'{several}; say which with occurrence=, a number or "all", or name one that occurs once')
        return starts
    if isinstance(occurrence, bool) or not isinstance(occurrence, int):
        raise TypeError(f'occurrence must be a number, "all" or None, got {occurrence!r}')
    if not -len(starts) <= occurrence < len(starts):
        raise IndexError(f"occurrence {occurrence} was asked for, but {several}")
    return [starts[occurrence]]


def _with(what: Any, changes: dict[str, Any]) -> Any:
    """A copy of which some attributes differ."""
    if is_dataclass(what) and not isinstance(what, type):
        return replace(what, **changes)
    copied = copy.copy(what)
    vars(copied).update(changes)
    return copied
