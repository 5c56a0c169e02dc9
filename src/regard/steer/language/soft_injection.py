"""Soft injection: a task, told to the heads as vectors instead of to the prompt as examples.

    O'_h = (1 − α_h) O_h + α_h t_h    at the last token of the prompt, for every head h of every layer

O_h is what the head puts out, P V; t_h, the task embedding, is its mean at the last token over prompts that do show examples
of the task; α_h in (0, 1) says how much this head has to do with the task. The α are learned with the model unchanged:
α = sigmoid(a), a = 0 to begin with, Adam with learning rate 0.2 on the cross-entropy of the answer's first token after
prompts without examples, one at a time, 400 steps; every 50 the mean loss on held-out prompts is taken, and the best α kept.

J. Park, W. Rhee (2025), Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning; 50 prompts of
10 examples make the embedding. In the authors' code the best loss is not noted, and so the latest α are kept; here the best
are. Left out: one set of α for several tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall
from regard.steer import steer
from regard.steer.add import AddToOutput
from regard.steer.custom import Custom
from regard.steer.edit import Edit
from regard.steer.gate import Gate
from regard.steer.language.example import Example, Progress, answer_log_probability, next_logits
from regard.tokens import Where

_VALIDATE_EVERY = 50


@dataclass(frozen=True, repr=False)
class InjectTask(Edit):
    """``O'_h = (1 − α_h) O_h + α_h t_h`` for chosen queries of one layer.

    Args:
        embedding: t, (heads, width) for each of the layer's query heads.
        coefficients: α, (heads,).
        queries: where; all by default.

    Raises:
        ValueError: tensors of another shape.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 2, 3, 4)
    >>> task, alpha = torch.tensor([[8.0], [8.0]]), torch.tensor([0.25, 1.0])
    >>> with regard.steer(None, InjectTask(task, alpha, queries=2)):
    ...     attention(q, k, torch.zeros(1, 2, 3, 1))[0, :, :, 0]
    tensor([[0., 0., 2.],
            [0., 0., 8.]])
    """

    embedding: Sequence[Sequence[float]] | Tensor
    coefficients: Sequence[float] | Tensor
    queries: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """The heads' own outputs, scaled, and the task's part added to them."""
        number, width = call.query.shape[1], call.value.shape[3]
        embedding, coefficients = (
            torch.as_tensor(given, device=call.query.device) for given in (self.embedding, self.coefficients)
        )
        shapes = tuple(embedding.shape), tuple(coefficients.shape)
        if shapes != ((number, width), (number,)):
            raise ValueError(
                f"InjectTask needs an embedding of shape ({number}, {width}) and coefficients of shape ({number},) for "
                f"{call.place.path}, got {shapes[0]} and {shapes[1]}"
            )
        call = Gate(1 - coefficients, queries=self.queries).apply(call, heads)
        return AddToOutput(coefficients[:, None] * embedding, queries=self.queries).apply(call, heads)


@dataclass(frozen=True)
class SoftInjection:
    """A task's embedding and how much of it each head takes, by layer: (heads, width) and (heads,).

    >>> injection = SoftInjection({0: torch.zeros(2, 4)}, {0: torch.tensor([0.1, 0.9])})
    >>> [edit.layers for edit in injection.edits(prompt=12)]
    [0]
    """

    embedding: dict[int, Tensor]
    coefficients: dict[int, Tensor]

    def edits(self, prompt: int | Tensor) -> tuple[InjectTask, ...]:
        """The edits for a prompt.

        Args:
            prompt: its number of tokens; for a batch with padding after the prompts, a boolean mask (batch, tokens) that
                is true at the last token of each.
        """
        last: Where = prompt - 1 if isinstance(prompt, int) else prompt
        return tuple(
            InjectTask(self.embedding[layer], self.coefficients[layer], last, layers=layer) for layer in self.embedding
        )


def task_embedding(
    model: Module, prompts: Sequence[Sequence[int] | Tensor], progress: Progress | None = None
) -> dict[int, Tensor]:
    """What each head puts out at the last token, on the mean over prompts: by layer (heads, width).

    Args:
        model: a language model that takes ``input_ids``.
        prompts: token ids of prompts that show examples of the task and end where an answer is due.
        progress: called with the number of prompts done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> task_embedding(model, [[3, 4, 5], [3, 6, 7, 8]])[1].shape
    torch.Size([2, 8])
    """
    if not prompts:
        raise ValueError("no prompts were given")
    sums: dict[int, Tensor] = {}

    def add(call: AttentionCall, heads: Tensor) -> AttentionCall:
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        row = call.map().rows([call.query.shape[2] - 1])
        output = (row @ value.to(row.dtype))[0, :, 0]
        sums[call.place.layer] = sums[call.place.layer] + output if call.place.layer in sums else output
        return call

    for number, prompt in enumerate(prompts):
        with torch.no_grad(), steer(model, Custom(add)):
            next_logits(model, prompt)
        if progress is not None:
            progress(number + 1, len(prompts))
    return {layer: total / len(prompts) for layer, total in sums.items()}


def learn_soft_injection(
    model: Module,
    examples: Sequence[Example],
    embedding: dict[int, Tensor],
    held_out: Sequence[Example] = (),
    steps: int = 400,
    learning_rate: float = 0.2,
    seed: int = 0,
    progress: Progress | None = None,
) -> SoftInjection:
    """Learn how much of a task's embedding each head should take.

    Args:
        model: a language model that takes ``input_ids``.
        examples: prompts without examples of the task, with an answer; one is drawn for each step.
        embedding: as `task_embedding` finds it.
        held_out: examples by which the best of the coefficients are chosen; the last are kept by default.
        steps: of Adam.
        learning_rate: of Adam.
        seed: of the order of the examples.
        progress: called with the number of steps done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> embedding = task_embedding(model, [[3, 4, 5, 6]])
    >>> injection = learn_soft_injection(model, [Example([5], answer=6)], embedding, steps=2)
    >>> injection.coefficients[0].shape
    torch.Size([2])
    """
    if not examples or not embedding:
        raise ValueError(
            f"learn_soft_injection needs examples and an embedding, got {len(examples)} examples and {len(embedding)} layers"
        )
    learned = {layer: torch.zeros(len(of), device=of.device, requires_grad=True) for layer, of in embedding.items()}
    optimizer = torch.optim.Adam(learned.values(), lr=learning_rate)
    random = torch.Generator().manual_seed(seed)
    best, least = _injection(embedding, learned), math.inf
    for step in range(steps):
        example = examples[int(torch.randint(len(examples), (), generator=random))]
        with torch.enable_grad():
            loss = _loss(model, example, SoftInjection(embedding, {n: a.sigmoid() for n, a in learned.items()}))
            gradients = torch.autograd.grad(loss, list(learned.values()))
        for parameter, gradient in zip(learned.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if held_out and step % _VALIDATE_EVERY == _VALIDATE_EVERY - 1:
            now = _injection(embedding, learned)
            with torch.no_grad():
                mean = math.fsum(float(_loss(model, example, now)) for example in held_out) / len(held_out)
            best, least = (now, mean) if mean < least else (best, least)
        if progress is not None:
            progress(step + 1, steps)
    return best if least < math.inf else _injection(embedding, learned)


def _injection(embedding: dict[int, Tensor], learned: dict[int, Tensor]) -> SoftInjection:
    return SoftInjection(embedding, {layer: a.detach().sigmoid() for layer, a in learned.items()})


def _loss(model: Module, example: Example, injection: SoftInjection) -> Tensor:
    with steer(model, *injection.edits(len(example))):
        return -answer_log_probability(next_logits(model, example.token_ids), example)
