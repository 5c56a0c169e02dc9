"""Which tokens of a text made a language model say what it says, by several explanations, and how true each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.explain._faithfulness import Faithfulness, faithfulness
from regard.explain.attn_lrp import AttnLRP
from regard.explain.captum import Captum
from regard.explain.explanation import Explanation
from regard.explain.flow import Flow
from regard.explain.generic_relevance import GenericRelevance
from regard.explain.rollout import Rollout
from regard.notation import parse
from regard.steer.question import question

CHANCE = "by chance"


@dataclass(frozen=True)
class Explained:
    """What was explained, ``said`` in words, and its value ``plain``; the ``tokens`` that were read, and by the name of each
    explanation their ``scores`` (tokens,) and the ``truth`` of these, beside that of scores by ``CHANCE``.
    """

    said: str
    plain: float
    tokens: list[str]
    scores: dict[str, Tensor]
    truth: dict[str, Faithfulness]


def read_explanation(text: str) -> Explanation:
    """An explanation as one writes it.

    Raises:
        ValueError: an unknown one, with the nearest known; arguments that it does not take.

    >>> read_explanation("rollout(residual=0.3)")
    Rollout(residual=0.3)
    """
    found: Explanation = parse(text, Explanation, "explanation", "Rollout(residual=0.3)")
    return found


def every_explanation() -> list[Explanation]:
    """Each explanation with its own defaults, and of captum's two.

    >>> [str(method) for method in every_explanation()][:3]
    ['AttnLRP()', 'GenericRelevance()', 'Rollout()']
    """
    gradients = Captum(method="LayerGradientXActivation")
    return [AttnLRP(), GenericRelevance(), Rollout(), Flow(), gradients, Captum(arguments={"n_steps": 20})]


def explain_text(
    model: Module,
    tokenizer: Any,
    text: str,
    methods: Sequence[Explanation],
    *,
    target: str,
    foil: str | None = None,
    chat: bool = False,
    steps: int = 10,
    progress: Callable[[str, int], None] = lambda said, total: None,
) -> Explained:
    """Explain why a language model goes on with a target, and not with a foil, and measure each explanation.

    What is explained is the logarithm of the target's probability, or with a foil the logit of the target less the foil's,
    where they part. Faithfulness is measured with the first token, which takes what attention is not needed, always shown.

    Args:
        model: a causal language model of transformers, with attn_implementation="sdpa".
        tokenizer: its fast tokenizer.
        text: what it reads.
        methods: such as ``regard.explain.GenericRelevance()``.
        target: how the text may go on; it usually begins with a space.
        foil: how else it may.
        chat: the text is a user's message, and is read in the tokenizer's chat template.
        steps: of `faithfulness`.
        progress: called for each explanation when it is there, with what it is and how many there are.

    Raises:
        ValueError: as `regard.steer.question.question`; a target of several tokens without a foil; no methods, or one twice.

    >>> import regard
    >>> from regard.explain import GenericRelevance
    >>> model, tokenizer = regard.mini()
    >>> text = "The code of Ada is 48213. The code of Tom is 70455. The code of Ada is"
    >>> found = explain_text(model, tokenizer, text, [GenericRelevance()], target=" 48213", foil=" 70455", steps=3)
    >>> found.said, found.tokens[int(found.scores["GenericRelevance"][:-1].argmax())]
    ("logit of '4' less that of '7'", '4')
    """
    asked = question(model, tokenizer, text, answer=target, wrong=foil, chat=chat)
    pieces = [tokenizer.decode([token]) for token in asked.read]
    if foil is None and asked.appended:
        raise ValueError(
            f"the target {target!r} is {asked.appended + 1} tokens, and one is explained: give a foil, from which it "
            "parts in one token, or its first token alone"
        )
    named = {repr(method).removesuffix("()"): method for method in methods}
    if len(named) < len(methods) or not methods:
        raise ValueError(f"explanations must be some, each once, got {', '.join(map(repr, methods)) or 'none'}")
    with torch.no_grad():
        plain = float(asked.metric(model(**asked.inputs)))
    scores, truth = {}, {}
    for name, method in named.items():
        scores[name] = method.explain(model, asked.inputs, asked.metric)[0].cpu()
        progress(name, len(named))
    chance = torch.rand(len(pieces), generator=torch.Generator().manual_seed(0))
    keep = [0, -1] if len(pieces) > 1 else -1
    for name, found in {**scores, CHANCE: chance}.items():
        device = asked.inputs["input_ids"].device
        truth[name] = faithfulness(model, asked.inputs, found[None].to(device), asked.metric, steps=steps, keep=keep)
    return Explained(asked.said, plain, pieces, scores, truth)
