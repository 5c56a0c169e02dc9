"""One text that is read once, and what is found of it with any number of compressed caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

import regard
from bench.cache_texts import Question, Text
from bench.other_interpreter import OtherInterpreter
from bench.prompt import Prompt
from bench.reading import read_apart
from regard.cache import KeepAll, Policy, QAdA, Quest
from regard.cache.report import report

WRITTEN = 32  # tokens of what the model writes by itself
STEPS = 8  # timed
IN_STEPS = 4  # questions to policies that choose at each step, whose answers are read token by token
Measures = dict[str, Any]


def block(model: Any, policy: Policy) -> AbstractContextManager[object]:
    """In which a cache is read: policies that choose at each step do so, others have chosen."""
    return regard.compress(model, policy if reads_in_steps(policy) else KeepAll())


def reads_in_steps(policy: Policy) -> bool:
    """Whether it keeps all, of which each step reads a part."""
    return isinstance(policy, Quest | QAdA)


def goes_by_questions(policy: Policy) -> bool:
    """Whether what it keeps depends on the attention of the last tokens, so that a question there is something to it."""
    return policy.reads.attention_of != 0 or (isinstance(policy, KeepAll) and not reads_in_steps(policy))


def row_of(question: Question) -> list[int]:
    """A question and its answer but for the last token."""
    return [*question.ids, *question.answer[:-1]]


def is_first_choice(choices: Sequence[int], question: Question) -> bool:
    """Whether each token of the answer is the first choice after the question and what is right before it."""
    return list(choices[len(question.ids) - 1 :]) == list(question.answer)


def answered_in_steps(model: Any, compressed: Any, question: Question) -> bool:
    """Whether a question is answered, read at once, and the answer token by token."""
    choices = []
    for ids in (question.ids, *((token,) for token in question.answer[:-1])):
        choices += model(torch.tensor([ids]), past_key_values=compressed).logits[0].argmax(dim=-1).tolist()
    compressed.crop(1 - len(question.ids) - len(question.answer))
    return is_first_choice(choices, question)


@dataclass
class Case:
    """A text that is read once, when it is first asked for."""

    model: Any
    text: Text
    is_timed: bool = False
    _after: dict[Question, Prompt] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> Prompt:
        """The text, read."""
        return Prompt(self.model, torch.tensor([self.text.ids]))

    def asked(self, question: Question) -> Prompt:
        """The text with a question, read."""
        if question not in self._after:
            self._after[question] = Prompt(self.model, torch.tensor([question.ids]), self.prompt)
        return self._after[question]

    @cached_property
    def written(self) -> list[int]:
        """What the model writes on, greedily, with the full cache."""
        model, full = self.model, self.prompt.compressed(KeepAll())
        tokens = [int(self.prompt.logits.argmax())]
        while len(tokens) < WRITTEN + 1:
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=full).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens

    def later(self, policy: Policy) -> Measures:
        """With questions that come after the text was compressed."""
        prompt, start = self.prompt, time.process_time()
        compressed = prompt.compressed(policy)
        taken = time.process_time() - start
        found = report(compressed, str(policy), policy.rest.frees)
        measures: Measures = {"bytes": found.bytes / found.full_bytes, "kept": found.kept, "seconds": taken}
        with block(self.model, policy):
            if reads_in_steps(policy):
                asked = self.text.questions[:IN_STEPS]
                answers = [answered_in_steps(self.model, compressed, one) for one in asked]
                return measures | {"right": answers}
            if self.is_timed:
                measures["step"] = self._step(compressed)
            logits = read_apart(self.model, compressed, self.rows)
        loss = functional.cross_entropy(logits[-2][:-1].float(), torch.tensor(self.rows[-2][1:]))
        return measures | self.judged([row.argmax(dim=-1).tolist() for row in logits], float(loss))

    @cached_property
    def rows(self) -> list[list[int]]:
        """What is read after the text: each question, how the book goes on, and what the model writes by itself."""
        return [*map(row_of, self.text.questions), list(self.text.continuation), self.written[:-1]]

    def judged(self, choices: Sequence[Sequence[int]], loss: float) -> Measures:
        """What first choices after each token of the rows are worth, beside the loss of the book's next tokens."""
        right = [is_first_choice(*pair) for pair in zip(choices, self.text.questions, strict=False)]
        same = statistics.mean(own == other for own, other in zip(choices[-1], self.written[1:], strict=True))
        return {"right": right, "loss": loss, "same": same}

    def right_later(self, policy: Policy) -> list[bool]:
        """Answers alone, to questions that come after the text was compressed."""
        compressed, rows = self.prompt.compressed(policy), [row_of(one) for one in self.text.questions]
        with block(self.model, policy):
            answers = [row.argmax(dim=-1).tolist() for row in read_apart(self.model, compressed, rows)]
        return [is_first_choice(*pair) for pair in zip(answers, self.text.questions, strict=True)]

    def pressed(self, presses: OtherInterpreter, name: str, budget: float) -> Measures:
        """As `later`, with a press of kvpress."""
        found = presses.ask(name=name, budget=budget, ids=self.text.ids, rows=self.rows)
        return {"bytes": budget} | self.judged(found["choices"], found["losses"][-2])

    def right_before(self, policy: Policy, questions: Sequence[Question]) -> list[bool]:
        """Answers to questions that were read, each by itself, before the text was compressed with them."""
        return [self._right_before(policy, question) for question in questions]

    def _right_before(self, policy: Policy, question: Question) -> bool:
        prompt, answer = self.asked(question), question.answer
        if int(prompt.logits.argmax()) != answer[0]:
            return False  # which the last token of the prompt has said before anything was compressed
        compressed = prompt.compressed(policy)
        with block(self.model, policy):
            logits = self.model(torch.tensor([answer[:-1]]), past_key_values=compressed).logits
        return bool(logits[0].argmax(dim=-1).tolist() == list(answer[1:]))

    def _step(self, compressed: Any) -> float:
        """Seconds of a decoding step, the median, of the processor."""
        token, taken = torch.tensor([self.text.continuation[:1]]), []
        for _ in range(STEPS + 2):
            start = time.process_time()
            self.model(token, past_key_values=compressed)
            taken.append(time.process_time() - start)
        compressed.crop(-STEPS - 2)
        return statistics.median(taken[2:])
