"""Texts to search on, and how well a model goes on with them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from regard.steer import steer
from regard.steer.edit import Edit
from regard.tokens import Positions


@dataclass(frozen=True)
class Example:
    """One text, and what a search needs to know of it.

    Args:
        token_ids: of the text, in one dimension.
        answer: the token that should come next.
        choices: the tokens among which the answer is looked for; the whole vocabulary by default.
        highlighted: positions of what matters in the text: a span to emphasize, the user's context, the relevant passage.
        response: positions of the tokens that should look there; the last token by default.

    >>> Example([5, 6, 7, 8], answer=9, highlighted=slice(1, 3))
    Example(token_ids=[5, 6, 7, 8], answer=9, choices=None, highlighted=slice(1, 3, None), response=-1)
    """

    token_ids: Sequence[int] | Tensor
    answer: int | None = None
    choices: Sequence[int] | None = None
    highlighted: Positions | None = None
    response: Positions = -1

    def __len__(self) -> int:
        return len(self.token_ids)


_AT_ONCE = 2048  # tokens of a batch

Measure = Callable[[Tensor, Example], float]
Edits = Callable[[Sequence[Example]], Sequence[Edit]]
"""The edits for a batch of examples of one length."""
Progress = Callable[[int, int], None]


def accuracy(logits: Tensor, example: Example) -> float:
    """1 if the answer is the likeliest of the choices, else 0.

    >>> accuracy(torch.tensor([0.0, 2.0, 3.0]), Example([0], answer=1, choices=[0, 1]))
    1.0
    """
    log_probabilities = _log_probabilities(logits, example)
    return float(log_probabilities.argmax() == _place_of_answer(example))


def answer_probability(logits: Tensor, example: Example) -> float:
    """The probability of the answer among the choices.

    >>> answer_probability(torch.tensor([0.0, 0.0, 3.0]), Example([0], answer=1, choices=[0, 1]))
    0.5
    """
    return float(answer_log_probability(logits, example).exp())


def confidence(logits: Tensor, example: Example) -> float:
    """The entropy of what comes next, in nats, with its sign changed; needs no answer.

    >>> round(confidence(torch.zeros(4), Example([0])), 4)
    -1.3863
    """
    log_probabilities = _log_probabilities(logits, example)
    return float(torch.special.entr(log_probabilities.exp()).sum().neg())


def answer_log_probability(logits: Tensor, example: Example) -> Tensor:
    """The logarithm of the answer's probability among the choices, differentiable."""
    return _log_probabilities(logits, example)[_place_of_answer(example)]


def next_logits(model: Module, token_ids: Sequence[int] | Tensor) -> Tensor:
    """(vocabulary,): what a model says to come next."""
    return batch_logits(model, [token_ids])[0]


def batch_logits(model: Module, texts: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """(batch, vocabulary): what a model says to come next after each of several texts of one length."""
    logits: Tensor = model(input_ids=token_batch(model, texts), **last_only(model)).logits[:, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_batch(model: Module, texts: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """(batch, tokens): texts of one length, where the model is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = [torch.as_tensor(ids, device=device) for ids in texts]
    for ids in rows:
        if ids.ndim != 1 or ids.is_floating_point() or not len(ids):
            raise ValueError(
                f"an example's token_ids must be ids of shape (tokens,), got {ids.dtype} {tuple(ids.shape)}"
            )
    return torch.stack(rows)


def last_only(model: Module) -> dict[str, int]:
    """What spares a model the logits of all tokens but the last, where it knows how to."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def mean_measure(model: Module, examples: Sequence[Example], measure: Measure, edits: Edits) -> float:
    """The measure's mean over examples, each steered by the edits of its batch."""
    if not examples:
        raise ValueError("no examples were given")
    total: list[float] = []
    for batch in batches(examples):
        made = edits(batch)
        with torch.no_grad(), steer(model, *made) if made else nullcontext():
            logits = batch_logits(model, [example.token_ids for example in batch])
        total.extend(map(measure, logits, batch))
    return math.fsum(total) / len(examples)


def batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of one length together, so many that a batch stays small."""
    by_length: dict[int, list[Example]] = {}
    for example in examples:
        by_length.setdefault(len(example), []).append(example)
    for length, alike in by_length.items():
        size = max(_AT_ONCE // max(length, 1), 1)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def highlighted(example: Example) -> Positions:
    """What matters in an example, refused where nobody said."""
    if example.highlighted is None:
        raise ValueError(
            f"this search needs examples with highlighted positions; one of {len(example)} tokens has none"
        )
    return example.highlighted


def _log_probabilities(logits: Tensor, example: Example) -> Tensor:
    chosen = logits if example.choices is None else logits[list(example.choices)]
    return torch.log_softmax(chosen, dim=-1, dtype=torch.float64)


def _place_of_answer(example: Example) -> int:
    if example.answer is None:
        raise ValueError(
            "this measure needs examples with an answer; without, measure=confidence calibrates on entropy"
        )
    if example.choices is None:
        return example.answer
    if example.answer not in example.choices:
        raise ValueError(f"the answer {example.answer} is not among the choices {list(example.choices)}")
    return list(example.choices).index(example.answer)
