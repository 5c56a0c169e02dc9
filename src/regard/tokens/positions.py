"""Positions of tokens: whatever a user may give for them, as a mask or as indices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

Positions = int | slice | Sequence[int] | Sequence[bool] | Sequence[Sequence[int]] | numpy.ndarray[Any, Any] | Tensor
Where = Positions | Callable[[Tensor], Tensor] | str

Plain = slice | list[int] | list[list[int]] | Tensor
"""What all positions come down to: a slice, a list, a list for each text, or a mask (tokens,) or (batch, tokens)."""

_FORMS = "an int, a slice, a range, several ints, several for each text, or a boolean mask (tokens,) or (batch, tokens)"


def resolve(
    where: Where | None,
    start: int,
    length: int,
    *,
    batch: int | None = None,
    token_ids: Tensor | None = None,
    device: torch.device | None = None,
    what: str = "positions",
) -> Tensor:
    """(batch or 1, length) boolean: which of the tokens start … start + length − 1 of the texts are meant.

    Positions are those of the text, padding included; negative ones count from its end, start + length, as far as it is
    known. One that the text has not reached yet is no error: ``generate`` may reach it, and `check` tells if nothing did.

    Args:
        where: an int, a slice, a range, a list, tuple, array or tensor of ints; lists of ints or a tensor (batch, number)
            for positions that differ from text to text; booleans (tokens,) or (batch, tokens), as a list, array or tensor;
            a function from token ids (batch, tokens) to such a tensor; None for every token.
        start: the position of the first token asked for.
        length: how many are asked for.
        batch: of the call, where each row of what is given for several texts stands for as many as make it up, since the
            beams of a text follow one another; None to leave as many rows as there are.
        token_ids: (batch, tokens) of the whole text, for functions.
        device: of the result; that of a mask, or else the CPU, by default.
        what: the argument's name, for errors.

    Raises:
        TypeError: what can be no positions.
        ValueError: nothing chosen; integers that look like a mask; a passage, which `locate` finds; another number of texts;
            a function, where the ids are not known or it returns no mask.

    >>> resolve([0, -1], 0, 4)
    tensor([[ True, False, False,  True]])
    >>> resolve([[0], [2, 3]], 2, 2, batch=2)
    tensor([[False, False],
            [ True,  True]])
    """
    if where is None:
        return torch.ones(1, length, dtype=torch.bool, device=device)
    end = start + length
    read = plain(_asked(where, token_ids, end, what) if callable(where) else where, what)
    if isinstance(read, Tensor):
        known = read[..., :end]
        mask = functional.pad(known, (0, end - known.shape[-1]))[..., start:]
        mask = mask if mask.ndim == 2 else mask[None]
    elif isinstance(read, slice):
        mask = _of_range(range(end)[read], start, length)
    else:
        mask = _of_numbers([read] if isinstance(read[0], int) else read, start, length)
    return _for_batch(mask, batch, what).to(device)


def check(where: Where | None, tokens: int, what: str = "positions") -> None:
    """Refuse positions that no text reached, of which the longest has this many tokens.

    A slice may start before the text, as in ``slice(-128, None)``, but not end beyond it. Of functions nothing is known.

    Raises:
        IndexError: a position beyond the text.
        ValueError: a slice or a mask that selects none of it.

    >>> check([3, 9], 5, "keys")
    Traceback (most recent call last):
    IndexError: keys names position 9, but 5 tokens were seen
    """
    if where is None or callable(where):
        return
    read = plain(where, what)
    if isinstance(read, slice):
        nothing = not range(tokens)[read]
    else:
        nothing = isinstance(read, Tensor) and not bool(read[..., :tokens].any()) and not bool(read[..., tokens:].any())
    if nothing:
        raise ValueError(f"{what} select none of the {tokens} tokens that were seen")
    _check_bounds(read, tokens, what, "position", f"{tokens} tokens were seen")


def check_form(where: Where | None, what: str = "positions") -> None:
    """Refuse what can be no positions of any text, when they are given: passages and functions may be.

    Raises:
        TypeError, ValueError: as `resolve`.

    >>> check_form([0.5], "keys")
    Traceback (most recent call last):
    TypeError: keys must be an int, a slice, a range, several ints, several for each text, or a boolean mask (tokens,) or
    (batch, tokens), got 0.5 among them
    """
    if where is not None and not callable(where) and not isinstance(where, str):
        plain(where, what)


def indices(
    where: Positions,
    length: int,
    what: str = "positions",
    *,
    unit: str = "tokens",
    name: str = "position",
    there: str | None = None,
) -> Tensor:
    """(number,) positions among ``length`` that are all there, from 0 up, in the order given.

    Args:
        where: as for `resolve`, but the same for all texts, and no function. A mask has one entry for each.
        length: how many there are.
        what: the argument's name, for errors.
        unit: what there are so many of, for errors.
        name: what one of them is called, for errors.
        there: how many there are, in words, for errors.

    Raises:
        TypeError: what can be no positions.
        IndexError: a position beyond; a mask of another length.
        ValueError: nothing chosen.

    >>> indices([2, -1, 0], 4)
    tensor([2, 3, 0])
    >>> indices(slice(5), 4, "keys", unit="keys")
    Traceback (most recent call last):
    IndexError: keys ends at 5, but there are 4 keys
    """
    read = plain(where, what, repeats=True)
    there = there or f"there are {length} {unit}"
    if isinstance(read, Tensor):
        if read.shape not in ((length,), (1, length)):
            raise IndexError(f"{what} is a mask of shape {tuple(read.shape)}, but {there}")
        chosen = read.reshape(-1).nonzero().squeeze(-1)
    else:
        if isinstance(read, list) and not isinstance(read[0], int):
            raise TypeError(f"{what} must be the same for all texts, got a list for each of {len(read)}")
        _check_bounds(read, length, what, name, there)
        chosen = torch.arange(length)[read] if _goes_up(read) else torch.tensor(_listed(read, length))
        chosen = torch.where(chosen < 0, chosen + length, chosen)
    if not len(chosen):
        raise _is_empty(f"{_short(where)} of {length} {unit}", what)
    return chosen


def among(
    where: Positions, length: int, what: str = "positions", *, unit: str = "tokens", batch: int | None = None
) -> Tensor:
    """(batch or 1, length) boolean: which of ``length`` that are all there are meant.

    Raises:
        TypeError: what can be no positions.
        IndexError: a position beyond; a mask of another length.
        ValueError: nothing chosen, but by a mask; another number of texts.

    >>> among([[0], [1, 2]], 3, batch=2)
    tensor([[ True, False, False],
            [False,  True,  True]])
    """
    read, there = plain(where, what), f"there are {length} {unit}"
    if isinstance(read, Tensor):
        if read.shape[-1] != length:
            raise IndexError(f"{what} is a mask of shape {tuple(read.shape)}, but {there}")
    else:
        _check_bounds(read, length, what, "position", there)
        if isinstance(read, slice) and not range(length)[read]:
            raise _is_empty(f"{where!r} of {length} {unit}", what)
    return resolve(read, 0, length, batch=batch, what=what)


def plain(where: Positions | str, what: str = "positions", *, repeats: bool = False) -> Plain:
    """Positions in one of four forms: a slice, a list, a list for each text, or a mask (tokens,) or (batch, tokens).

    Args:
        where: as for `resolve`, but no function.
        what: the argument's name, for errors.
        repeats: whether a position may be named twice. A list of zeros and ones that names one twice is taken for a mask
            that was not made of booleans, and refused.

    Raises:
        TypeError, ValueError: as `resolve`.

    >>> plain(range(2, 5)), plain(numpy.array([True, False]))
    ([2, 3, 4], tensor([ True, False]))
    """
    if isinstance(where, slice):
        return _plain_slice(where, what)
    if isinstance(where, str):
        raise ValueError(f"{where!r} is a passage of a text; regard.locate(edit, text, tokenizer) finds its positions")
    if isinstance(where, Tensor | numpy.ndarray):
        return _plain_array(where, what, repeats)
    if isinstance(where, range | list | tuple):
        return _plain_sequence(where, what, repeats)
    if _is_int(where):
        return [operator.index(where)]  # type: ignore[arg-type]
    raise _not_positions(where, what)


def _asked(function: Callable[[Tensor], Tensor], token_ids: Tensor | None, end: int, what: str) -> Tensor:
    """The mask that a function makes of the ids of all tokens."""
    if token_ids is None or token_ids.shape[1] < end:
        known = "none" if token_ids is None else f"only those of the first {token_ids.shape[1]}"
        raise ValueError(
            f"{what} is a function of token ids, but of {end} tokens {known} are known: the model was not given them as "
            "input_ids. Pass positions or a boolean mask instead"
        )
    mask = function(token_ids)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != token_ids.shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a function of token ids must return a boolean mask of shape {tuple(token_ids.shape)}, got {got}"
        )
    return mask


def _of_range(chosen: range, start: int, length: int) -> Tensor:
    """(1, length) boolean: which of the tokens start … start + length − 1 are in the range."""
    mask = torch.zeros(1, length, dtype=torch.bool)
    upwards = chosen if chosen.step > 0 else chosen[::-1]
    there = upwards[max((start - upwards.start + upwards.step - 1) // upwards.step, 0) :]
    if there:
        mask[:, there.start - start : there.stop - start : there.step] = True
    return mask


def _of_numbers(rows: Sequence[Sequence[int]], start: int, length: int) -> Tensor:
    """(rows, length) boolean: which of the tokens start … start + length − 1 each row names."""
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, chosen in enumerate(rows):
        local = [position - start if position >= 0 else position + length for position in chosen]
        here = [position for position in local if 0 <= position < length]
        if here:
            mask[row, here[0] if len(here) == 1 else here] = True
    return mask


def _for_batch(mask: Tensor, batch: int | None, what: str) -> Tensor:
    rows = mask.shape[0]
    if batch is None or rows in (1, batch):
        return mask
    if batch % rows:
        raise ValueError(f"{what} is a mask for {rows} texts, or positions for so many, but the batch is {batch}")
    return mask.repeat_interleave(batch // rows, dim=0)  # the beams of one text follow one another


def _check_bounds(read: Plain, length: int, what: str, name: str, there: str) -> None:
    """Refuse what names a position that is not there."""
    if isinstance(read, slice):
        last = read.stop if _goes_up(read) else read.start
        if last is not None and last >= length + _goes_up(read):
            raise IndexError(f"{what} {'ends' if _goes_up(read) else 'starts'} at {last}, but {there}")
    elif isinstance(read, Tensor):
        beyond = read[..., length:].nonzero()
        if len(beyond):
            raise IndexError(f"{what} names {name} {length + int(beyond[0, -1])}, but {there}")
    elif isinstance(read[0], int):
        for position in read:
            if not -length <= position < length:
                raise IndexError(f"{what} names {name} {position}, but {there}")
    else:
        for number, row in enumerate(read):
            _check_bounds(row or [0], length, f"{what} of text {number}", name, there)


def _plain_slice(where: slice, what: str) -> slice:
    try:
        start, stop, step = (None if x is None else operator.index(x) for x in (where.start, where.stop, where.step))
    except TypeError:
        raise TypeError(f"{what} must be a slice of ints, got {where!r}") from None
    if step == 0:
        raise ValueError(f"{what} is a slice that goes nowhere: {where!r}")
    return slice(start, stop, step)


def _goes_up(read: Plain) -> bool:
    return isinstance(read, slice) and (read.step or 1) > 0


def _listed(read: Plain, length: int) -> Any:
    return list(range(length)[read]) if isinstance(read, slice) else read


def _plain_array(where: Tensor | numpy.ndarray[Any, Any], what: str, repeats: bool) -> Plain:
    kind = str(where.dtype).removeprefix("torch.")
    if kind == "object" and where.ndim:
        return _plain_sequence(where.tolist(), what, repeats)
    if kind == "bool" and where.ndim in (1, 2):
        return where if isinstance(where, Tensor) else torch.tensor(where.tolist())
    if 0 in where.shape:
        raise _is_empty(_short(where), what)
    if kind.startswith(("int", "uint")) and where.ndim <= 2:
        narrow = kind in ("int8", "uint8") and where.ndim
        if narrow and bool(((where == 0) | (where == 1)).all()):
            raise _is_mask(f"{kind} {tuple(where.shape)}", what)
        return _plain_sequence(where.tolist() if where.ndim else [where.item()], what, repeats)
    raise _not_positions(f"{kind} {tuple(where.shape)}", what)


def _plain_sequence(where: Sequence[Any], what: str, repeats: bool) -> Plain:
    if isinstance(where, range) or all(type(entry) is int for entry in where):
        chosen = list(where)
        if not chosen:
            raise _is_empty(_short(where), what)
        if not repeats and len(chosen) > 2 and set(chosen) <= {0, 1}:
            raise _is_mask(chosen if len(chosen) < 9 else f"{len(chosen)} of them", what)
        return chosen
    if all(map(_is_bool, where)):
        return torch.tensor([bool(entry) for entry in where])
    if all(_is_int(entry) for entry in where):
        return _plain_sequence([operator.index(entry) for entry in where], what, repeats)
    if all(isinstance(entry, range | list | tuple | Tensor | numpy.ndarray) and _ndim(entry) for entry in where):
        return _plain_rows(where, what, repeats)
    strange = next(entry for entry in where if not _is_int(entry))
    if _is_bool(strange):
        raise TypeError(f"{what} must be positions or booleans, got both in one list: {_short(where)}")
    raise _not_positions(strange, what, " among them")


def _plain_rows(where: Sequence[Any], what: str, repeats: bool) -> Plain:
    """Positions for each text, where a text may have none; or a mask for each, all of one length."""
    rows = [plain(row, what, repeats=repeats) if len(row) else [] for row in where]
    masks = [row for row in rows if isinstance(row, Tensor) and row.ndim == 1]
    if masks and len(masks) == len(rows) and len({len(mask) for mask in masks}) == 1:
        return torch.stack(masks)
    lists = [row for row in rows if isinstance(row, list) and not any(isinstance(entry, list) for entry in row)]
    if len(lists) < len(rows):
        raise TypeError(f"{what} must be positions for each text, or masks of one length, got {_short(where)}")
    if not any(lists):
        raise _is_empty(_short(where), what)
    return lists  # type: ignore[return-value]


def _is_bool(entry: object) -> bool:
    return isinstance(entry, bool | numpy.bool_)


def _is_int(entry: object) -> bool:
    if isinstance(entry, Tensor):
        return (
            entry.ndim == 0 and not entry.is_floating_point() and not entry.is_complex() and entry.dtype != torch.bool
        )
    return isinstance(entry, int | numpy.integer) and not isinstance(entry, bool)


def _ndim(entry: Any) -> int:
    return int(getattr(entry, "ndim", 1))


def _short(value: object) -> str:
    written = str(value)
    return written if len(written) <= 80 else f"{written[:80]} …"


def _is_empty(where: str, what: str) -> ValueError:
    return ValueError(f"{what} is empty: {where} names none; leave it out, or name some")


def _is_mask(got: object, what: str) -> ValueError:
    return ValueError(
        f"{what} are zeros and ones, {got}: is this a mask? Pass booleans, as .bool() makes them, or name each once"
    )


def _not_positions(got: object, what: str, where: str = "") -> TypeError:
    return TypeError(f"{what} must be {_FORMS}, got {_short(got)}{where}")
