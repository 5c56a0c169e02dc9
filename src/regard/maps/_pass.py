"""Questions about one matrix, collected so that one pass of a kernel answers them together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regard.maps._request import ALIGNMENT, Blocks, Request
from regard.maps._scores import Scores
from regard.maps._select import KernelName, evaluate


class Question(NamedTuple):
    """A product asked of the matrix; ``side`` names the field of the request that its columns become a part of."""

    side: Literal["values", "weights", "received", "entropy", "segments", "blocks", "distance"]
    columns: Tensor | None = None
    segments: tuple[tuple[slice, ...], ...] = ()
    argument: object = None  # what the key identifies, kept alive so that no other object takes its identity
    native: bool = False  # good enough in the inputs' own half precision, as plain attention is
    blocks: Blocks | None = None
    distance: int = 0


class Pass:
    """Collects questions by key and answers all of them when the first answer is taken."""

    def __init__(self, scores: Scores, kernel: KernelName) -> None:
        self.scores = scores
        self.kernel = kernel
        self.progress: Callable[[float], None] | None = None
        self._questions: dict[Hashable, Question] = {}
        self._answers: dict[Hashable, Tensor] = {}
        self._arguments: dict[Hashable, object] = {}

    def ask(self, key: Hashable, question: Question) -> None:
        """Add a question, unless it was asked before."""
        if not self._answered(key):
            self._questions.setdefault(key, question)
            self._arguments[key] = question.argument

    @property
    def pending(self) -> bool:
        """Whether a question waits for its answer."""
        return bool(self._questions)

    def knows(self, key: Hashable) -> bool:
        """Whether the question was asked."""
        return key in self._questions or self._answered(key)

    def _answered(self, key: Hashable) -> bool:
        """Whether the answer is there, with its gradient if one is wanted now."""
        return key in self._answers and (self._answers[key].requires_grad or not self.scores.requires_grad)

    def take(self, key: Hashable) -> Tensor:
        """The answer, which is forgotten; but for the log-sum-exp, which is small and often wanted again."""
        if not self._answered(key):
            self._run()
        self._arguments.pop(key, None)
        keep = key == "logsumexp" and not self._answers[key].requires_grad
        return self._answers[key] if keep else self._answers.pop(key)

    def _run(self) -> None:
        questions = self._questions
        blocks, distance = (_first(questions, side) for side in ("blocks", "distance"))
        self._questions = {  # one picture and one distance a pass: others wait for the next
            key: question
            for key, question in questions.items()
            if question.side in ("blocks", "distance") and key not in (blocks, distance)
        }
        for key in self._questions:
            del questions[key]
        native = bool(questions) and all(question.native for question in questions.values())
        half_is_fast = native and self.kernel in ("auto", "fused") and self.scores.query.is_cuda
        request = Request(
            dtype=self.scores.query.dtype if half_is_fast else self.scores.dtype,
            values=_join([q.columns for q in questions.values() if q.side == "values"], self.scores),
            weights=_join([q.columns for q in questions.values() if q.side == "weights"], self.scores),
            received=next((q.columns for q in questions.values() if q.side == "received"), None),
            entropy="entropy" in questions,
            segments=tuple(runs for question in questions.values() for runs in question.segments),
            blocks=None if blocks is None else questions[blocks].blocks,
            distance=None if distance is None else questions[distance].distance,
            progress=self.progress,
        )
        answer = evaluate(self.scores, request, self.kernel)
        self._answers["logsumexp"] = answer.logsumexp
        if answer.entropy is not None:
            self._answers["entropy"] = answer.entropy
        if answer.received is not None:
            self._answers["received"] = answer.received
        if blocks is not None and answer.blocks is not None:
            self._answers[blocks] = answer.blocks
        if distance is not None and answer.distance is not None:
            self._answers[distance] = answer.distance
        self._answers |= _parts(answer.forward, questions, "values")
        self._answers |= _parts(answer.transposed, questions, "weights")
        self._answers |= _parts(answer.mass, questions, "segments")


def _first(questions: dict[Hashable, Question], side: str) -> Hashable | None:
    """The key of the first question of its kind."""
    return next((key for key, question in questions.items() if question.side == side), None)


def _join(columns: list[Tensor | None], scores: Scores) -> Tensor | None:
    """Side by side; where some come with query heads, those of key heads are repeated to match."""
    tensors = [tensor for tensor in columns if tensor is not None]
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    heads = max(tensor.shape[1] for tensor in tensors)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    tensors = [tensor.repeat_interleave(heads // tensor.shape[1], dim=1).to(dtype) for tensor in tensors]
    width = sum(tensor.shape[-1] for tensor in tensors)
    filling = tensors[0].new_zeros(()).expand(*tensors[0].shape[:-1], -width % ALIGNMENT)
    return torch.cat([*tensors, filling], dim=-1)


def _parts(product: Tensor | None, questions: dict[Hashable, Question], side: str) -> dict[Hashable, Tensor]:
    """Give each question of this side its columns of the product."""
    if product is None:
        return {}
    parts, start = {}, 0
    for key, question in questions.items():
        if question.side == side:
            width = len(question.segments) if question.columns is None else question.columns.shape[-1]
            parts[key] = product if width == product.shape[-1] else product[..., start : start + width]
            start += width
    return parts
