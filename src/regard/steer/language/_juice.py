"""JUICE, just run twice: strengthen and weaken heads by what they put out in a run that nothing was done to.

    O'_h = O_h + α⁺ · Ō_h   for the heads to enlarge,     O'_h = O_h − α⁻ · Ō_h   for those to suppress

Ō_h is the head's output P V at the same token in a first, clean run, O_h what it is in the second, where the heads before it
are changed already. A gate 1 + α in one run would use O_h instead: heads carry both memory and context, and which of the two
turns with what is done to the heads before.

G. Li, Y. Chen, H. Tong (2025), Taming Knowledge Conflicts in Language Models. Heads are chosen as there. Each is scaled
alone, with α in (1, 3, 5, 10, 30) to enlarge and in (−1, −2, −5) to suppress; its score on a set of examples is the mean
change of the answer's probability. Heads that gain on every set (a clean prompt, a conflicting sentence, a coherent
conflicting paragraph) are ranked by the sum over sets. α⁺ from 0 to 5 and α⁻ from 0 to 3 are searched on held-out examples
by accuracy, then by the answer's probability.

Both runs go through the model as one batch, the clean one its first half, and in ``generate`` both go on with the tokens
that the second chooses. Scaling one head alone is a gate 1 + α, as nothing before it was changed. Left out: the intervention
of one run, which is ``regard.Gate``, and the contrastive decoding that the paper compares with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, run
from regard.steer import steer
from regard.steer.add import with_added
from regard.steer.edit import Edit, check_number
from regard.steer.gate import Gate
from regard.steer.language.example import (
    Example,
    Progress,
    accuracy,
    answer_probability,
    batches,
    last_only,
    mean_measure,
    token_batch,
)
from regard.steer.language.heads import Head, every_head, only

_ENLARGE = (1.0, 3.0, 5.0, 10.0, 30.0)
_SUPPRESS = (-1.0, -2.0, -5.0)


@dataclass(frozen=True, repr=False)
class JustRunTwice(Edit):
    """``O' = O + by · Ō``: to each head's output in the second half of the batch add its output in the first half.

    Args:
        by: α, any finite number.

    Raises:
        ValueError: α infinite or NaN; a batch that has no two halves.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 2, 1, 3, 4)
    >>> v = torch.tensor([1.0, 10.0]).view(2, 1, 1, 1).expand(2, 1, 3, 1)
    >>> with regard.steer(None, JustRunTwice(by=2)):
    ...     attention(q, k, v)[:, 0, 0, 0]
    tensor([ 1., 12.])
    """

    by: float

    def __post_init__(self) -> None:
        check_number(self, "by")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """More to add to the second half: what the first puts out."""
        if call.query.shape[0] % 2:
            raise ValueError(
                f"JustRunTwice needs a batch whose first half is the clean run, but {call.place.path} has a batch of "
                f"{call.query.shape[0]}; use run_twice or generate_twice"
            )
        clean, _ = run(call).chunk(2)
        return with_added(call, heads[None, :, None], torch.cat([torch.zeros_like(clean), self.by * clean]))


@dataclass(frozen=True)
class JuiceHeads:
    """The heads to enlarge and those to suppress, pairs (layer, head), the best first.

    >>> JuiceHeads(enlarge=[(1, 0)], suppress=[(0, 1)])
    JuiceHeads(enlarge=[(1, 0)], suppress=[(0, 1)])
    """

    enlarge: list[Head]
    suppress: list[Head]


def juice(heads: JuiceHeads, up: float, down: float) -> tuple[JustRunTwice, ...]:
    """The edits for `run_twice` and `generate_twice`; a factor of 0 makes none.

    Args:
        heads: as `find_juice_heads` finds them.
        up: α⁺.
        down: α⁻.

    >>> juice(JuiceHeads([(1, 0)], [(0, 1)]), up=3, down=2)
    (JustRunTwice(by=3, layers=[1], heads={1: [0]}), JustRunTwice(by=-2, layers=[0], heads={0: [1]}))
    """
    wanted = [(up, heads.enlarge), (-down, heads.suppress)]
    return tuple(JustRunTwice(by, **only(chosen)) for by, chosen in wanted if by and chosen)


def run_twice(model: Module, edits: Sequence[Edit], **inputs: Any) -> Tensor:
    """The logits (batch, tokens, vocabulary) of the second run.

    Args:
        model: a language model.
        edits: as `juice` makes them; other edits hold in both runs.
        inputs: for the model; tensors are passed twice.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> edits = juice(JuiceHeads([(0, 1)], [(1, 0)]), up=2, down=1)
    >>> with torch.no_grad():
    ...     run_twice(model, edits, input_ids=torch.tensor([[3, 4, 5]])).shape
    torch.Size([1, 3, 20])
    """
    with steer(model, *edits) if edits else nullcontext():
        logits: Tensor = model(**_doubled(inputs)).logits
    return logits.chunk(2)[1]


def generate_twice(model: Any, edits: Sequence[Edit], **inputs: Any) -> Tensor:
    """``model.generate`` of the second run: the token ids (batch, tokens).

    Args:
        model: a transformers model.
        edits: as `juice` makes them; other edits hold in both runs.
        inputs: for ``generate``; tensors are passed twice.

    Raises:
        ValueError: sampling, with which the two runs would part.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20, eos_token_id=None)).eval()
    >>> edits = juice(JuiceHeads([(0, 1)], [(1, 0)]), up=2, down=1)
    >>> generate_twice(model, edits, input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=4).shape
    torch.Size([1, 7])
    """
    from transformers import LogitsProcessorList

    if inputs.get("do_sample", False):
        raise ValueError("generate_twice needs do_sample=False: the two runs must go on with the same tokens")
    processors = LogitsProcessorList([*inputs.pop("logits_processor", []), _follow_second_half])
    with steer(model, *edits) if edits else nullcontext():
        tokens: Tensor = model.generate(**_doubled(inputs) | {"do_sample": False, "logits_processor": processors})
    return tokens.chunk(2)[1]


def find_juice_heads(
    model: Module,
    sets: Mapping[str, Sequence[Example]],
    number: int = 5,
    enlarge: Sequence[float] = _ENLARGE,
    suppress: Sequence[float] = _SUPPRESS,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> JuiceHeads:
    """The heads that help the answer in every kind of prompt when they are enlarged, and when they are suppressed.

    Args:
        model: a language model that takes ``input_ids``.
        sets: kinds of prompt by name, each with examples that have an answer: what the model knows, to steer to
            memory, or what the context says.
        number: of heads of either kind, at most; the paper takes 5, for some models 10.
        enlarge, suppress: the factors α to try.
        heads: those to try; all by default.
        progress: called with the number of heads done and in all.

    Raises:
        ValueError: no sets, or one without examples.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> found = find_juice_heads(model, {"clean": [Example([3, 4, 5], answer=7)]}, number=1)
    >>> len(found.enlarge) <= 1
    True
    """
    if not sets or not all(sets.values()):
        raise ValueError(
            f"find_juice_heads needs sets that have examples, got { ({n: len(s) for n, s in sets.items()}) }"
        )
    first = next(iter(sets.values()))[0]
    heads = every_head(model, first.token_ids) if heads is None else heads
    plain = {name: mean_measure(model, examples, answer_probability, _nothing) for name, examples in sets.items()}
    gains: dict[str, dict[Head, float]] = {"enlarge": {}, "suppress": {}}
    for done, head in enumerate(heads):
        for kind, factors in (("enlarge", enlarge), ("suppress", suppress)):
            of_sets = [_gain(model, examples, head, factors) - plain[name] for name, examples in sets.items()]
            if min(of_sets) > 0:
                gains[kind][head] = math.fsum(of_sets)
        if progress is not None:
            progress(done + 1, len(heads))
    best = {kind: sorted(of, key=of.__getitem__, reverse=True)[:number] for kind, of in gains.items()}
    return JuiceHeads(**best)


def calibrate_juice(
    model: Module,
    examples: Sequence[Example],
    heads: JuiceHeads,
    up: Sequence[float] = range(6),
    down: Sequence[float] = range(4),
    progress: Progress | None = None,
) -> tuple[JustRunTwice, ...]:
    """The edits with the best α⁺ and α⁻, by accuracy and then by the answer's probability; none if nothing does better.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with an answer.
        heads: as `find_juice_heads` finds them.
        up, down: the α⁺ and α⁻ to try.
        progress: called with the number of pairs done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> edits = calibrate_juice(model, [Example([3, 4, 5], answer=7)], JuiceHeads([(0, 1)], []), up=[0, 1], down=[0])
    >>> edits in ((), juice(JuiceHeads([(0, 1)], []), up=1, down=0))
    True
    """
    if not examples:
        raise ValueError("no examples were given")
    pairs = list(product(up, down))
    scores: dict[tuple[float, float], tuple[float, float]] = {}
    for number, (larger, smaller) in enumerate(pairs):
        scores[larger, smaller] = _score_twice(model, juice(heads, larger, smaller), examples)
        if progress is not None:
            progress(number + 1, len(pairs))
    return juice(heads, *max(scores, key=scores.__getitem__))


def _gain(model: Module, examples: Sequence[Example], head: Head, factors: Sequence[float]) -> float:
    """The answer's mean probability over factors and examples, with one head scaled."""
    probabilities = [mean_measure(model, examples, answer_probability, partial(_scaled, head, by)) for by in factors]
    return math.fsum(probabilities) / len(probabilities)


def _scaled(head: Head, by: float, batch: Sequence[Example]) -> tuple[Gate]:
    return (Gate(1 + by, layers=head[0], heads=head[1]),)


def _score_twice(model: Module, edits: Sequence[Edit], examples: Sequence[Example]) -> tuple[float, float]:
    right: list[float] = []
    probability: list[float] = []
    for batch in batches(examples):
        ids = token_batch(model, [example.token_ids for example in batch])
        with torch.no_grad():
            logits = run_twice(model, edits, input_ids=ids, **last_only(model))[:, -1].float()
        right.extend(map(accuracy, logits, batch))
        probability.extend(map(answer_probability, logits, batch))
    return math.fsum(right) / len(examples), math.fsum(probability) / len(examples)


def _doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for name, v in inputs.items()}


def _follow_second_half(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor: both runs go on as the second says."""
    return scores.chunk(2)[1].repeat(2, 1)


def _nothing(batch: Sequence[Example]) -> tuple[Edit, ...]:
    return ()
