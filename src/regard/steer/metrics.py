"""What a model's output says of an answer, as one number for each text of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Metric = Callable[[Any], Tensor]
"""From the output of a model to one number for each text, (batch,), or one for all."""

Tokens = int | Sequence[int] | Tensor
Position = int | Sequence[int] | Tensor


def logit_difference(answer: Tokens, wrong: Tokens, position: Position = -1) -> Metric:
    """The metric ``logit[answer] − logit[wrong]`` at a position of the text: how clearly one answer is before another.

    Args:
        answer: the number of a token (or of a class), or of one for each text.
        wrong: that of the token which it is compared with, in the same way.
        position: of the token after which the answer stands, or one for each text; the last by default, so that texts of
            different lengths are padded on the left. Logits of a whole input, (batch, classes), have none.

    Raises:
        IndexError: when it is applied to fewer positions or tokens than were named.
        TypeError: when it is applied to an output without logits.
        ValueError: when numbers were given for another count of texts.

    >>> metric = logit_difference(answer=2, wrong=0)
    >>> metric(torch.tensor([[[0.0, 0.0, 9.0], [1.0, 0.0, 4.0]]]))
    tensor([3.])
    """

    def metric(output: Any) -> Tensor:
        rows = _rows(_logits(output), position, 1)[:, 0]
        right, other = (_of_texts(tokens, rows, "token", rows.shape[1]) for tokens in (answer, wrong))
        return (rows.gather(1, right) - rows.gather(1, other))[:, 0]

    metric.__name__ = "logit difference"
    return metric


def log_probability(token_ids: Tokens, position: Position = -1) -> Metric:
    """The metric ``Σ_t log p(token_t | the text before it)``, in nats, of tokens that follow one another in the text.

    A text's own likelihood, minus its loss times its tokens, is ``log_probability(input_ids[:, 1:], position=-2)``.

    Args:
        token_ids: one token, several (tokens,), or those of each text (batch, tokens). The model must have read all but the
            last of them. Negative ones, as −100 in labels, count nothing.
        position: at which the last of them is predicted, or one for each text; the text's last by default.

    Raises:
        IndexError: when it is applied to fewer positions or tokens than were named.
        TypeError: when it is applied to an output without logits.
        ValueError: when numbers were given for another count of texts.

    >>> metric = log_probability([1, 1])
    >>> metric(torch.zeros(1, 5, 4)).exp()  # two times one in four
    tensor([0.0625])
    """

    def metric(output: Any) -> Tensor:
        logits = _logits(output)
        ids = _of_texts(token_ids, logits, "token", logits.shape[-1], several=True)
        chances = _rows(logits, position, ids.shape[1]).log_softmax(-1)
        found = chances.gather(2, ids.clamp(min=0)[..., None])[..., 0]
        return found.masked_fill(ids < 0, 0.0).sum(-1)

    metric.__name__ = "log-probability"
    return metric


def _logits(output: Any) -> Tensor:
    """(batch, positions, tokens), in float32 at least."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        seen = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise TypeError(f"the metric needs logits, (batch, positions, tokens) or (batch, classes), got {seen}")
    return found if found.ndim == 3 else found[:, None]


def _rows(logits: Tensor, position: Position, number: int) -> Tensor:
    """The logits at so many positions, of which the given one is the last, (batch, number, tokens)."""
    length = logits.shape[1]
    last = _of_texts(position, logits, "position", length, negative=True)
    first = torch.where(last < 0, last + length, last) - number + 1
    if bool((first < 0).any()):
        raise IndexError(f"{number} tokens end at position {position}, but the output has {length} positions")
    where = first + torch.arange(number, device=logits.device)
    rows = logits.gather(1, where[..., None].expand(-1, -1, logits.shape[2]))
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _of_texts(
    given: Any, logits: Tensor, what: str, below: int, several: bool = False, negative: bool = False
) -> Tensor:
    """(batch, 1) numbers from one or one for each text; with ``several`` (batch, number), from as many for all texts too."""
    numbers = torch.as_tensor(given, device=logits.device)
    if numbers.is_floating_point() or numbers.dtype == torch.bool or numbers.numel() == 0:
        raise ValueError(f"{what}s are whole numbers, got {given!r}")
    numbers = numbers.long()
    if numbers.ndim < 2:
        numbers = numbers.reshape(1, -1) if several else numbers.reshape(-1, 1)
    texts = logits.shape[0]
    if numbers.ndim > 2 or numbers.shape[0] not in (1, texts) or not (several or numbers.shape[1] == 1):
        raise ValueError(f"{what}s of shape {tuple(numbers.shape)} were given for a batch of {texts}")
    if (
        int(numbers.max()) >= below
        or (negative and int(numbers.min()) < -below)
        or (not (several or negative) and int(numbers.min()) < 0)
    ):
        raise IndexError(f"{what} {given!r} was named, but the output has {below} {what}s")
    return numbers.expand(texts, -1)
