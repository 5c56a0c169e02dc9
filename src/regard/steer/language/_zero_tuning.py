"""ZeroTuning: scale the attention to the initial token, on the heads that want it scaled the same way.

    P'_i0 = γ P_i0 / (1 + (γ − 1) P_i0),    P'_ij = P_ij / (1 + (γ − 1) P_i0)

on chosen heads: ``Reweight(keys=0, by=γ)``, a term log γ of one logit. The initial token is an attention sink; γ > 1 flattens
what is left for the others, γ < 1 sharpens their differences.

F. Han, X. Yu, J. Tang, D. Rao, W. Du, L. Ungar (2025), ZeroTuning: Unlocking the Initial Token's Power to Enhance Large
Language Models Without Training. In its three steps heads are profiled, each tried alone with its attention to the initial
token doubled: *up-effective* ones do better with it than the plain model, *down-effective* ones worse; those of the larger
group are rescaled together; and γ is searched for, by accuracy on labelled examples (supervised), or by the least entropy of
the model's output (unsupervised).

A head that makes no difference is in neither group. As in the authors' code a head is a number, scaled in every layer at
once, unless ``each_layer`` is asked for; which γ to try is up to the user. Left out: the variant that scales queries or keys
for kernels that hide their attention, as the term of the logits is exact in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

from regard.steer.language.example import Example, Measure, Progress, accuracy, mean_measure
from regard.steer.language.heads import Head, every_head, only
from regard.steer.reweight import Reweight
from regard.tokens import Where

_FACTORS = (0.2, 0.4, 0.6, 0.8, 1.25, 1.5, 2.0, 3.0)


def zero_tuning(by: float, heads: Sequence[Head] | None = None, keys: Where = 0) -> Reweight:
    """The edit: the initial token's attention times γ, renormalised.

    Args:
        by: γ.
        heads: pairs (layer, head); every head by default.
        keys: where the initial token is, if padding comes before it: a boolean mask (batch, tokens).

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 3, 4)
    >>> with regard.steer(None, zero_tuning(by=2)):
    ...     attention(q, k, torch.eye(3, 4)[None, None])[0, 0, 0]
    tensor([0.5000, 0.2500, 0.2500, 0.0000])
    """
    return Reweight(keys=keys, by=by, **only(heads))


@dataclass(frozen=True)
class ZeroTuningProfile:
    """The up-effective heads, pairs (layer, head), and the down-effective ones.

    >>> ZeroTuningProfile(up=[(0, 1), (1, 1)], down=[(0, 0)]).dominant
    [(0, 1), (1, 1)]
    """

    up: list[Head]
    down: list[Head]

    @property
    def dominant(self) -> list[Head]:
        """The larger group."""
        return self.up if len(self.up) >= len(self.down) else self.down


@dataclass(frozen=True)
class ZeroTuning:
    """What a calibration found: the edit to steer with, its score and γ, the score of no edit, and the profile of the heads.

    >>> ZeroTuning(zero_tuning(1.5), 1.5, 0.8, 0.7, ZeroTuningProfile([(0, 1)], [])).by
    1.5
    """

    edit: Reweight
    by: float
    score: float
    plain_score: float
    profile: ZeroTuningProfile


def profile_zero_tuning(
    model: Module,
    examples: Sequence[Example],
    measure: Measure = accuracy,
    probe: float = 2.0,
    each_layer: bool = False,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> ZeroTuningProfile:
    """Which heads do better, and which worse, with more attention to the initial token.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with an answer, unless the measure needs none.
        measure: `accuracy` or `answer_probability` (supervised), or `confidence` (unsupervised).
        probe: the γ at which each head is tried, greater than 1.
        each_layer: try the heads of each layer on their own, not those of one number in all layers.
        heads: those to try, pairs (layer, head); all by default.
        progress: called with the number of tries done and in all.

    Raises:
        ValueError: a probe that is not greater than 1, no examples.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from regard.steer.language import confidence
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20, initializer_range=0.3)).eval()
    >>> profile = profile_zero_tuning(model, [Example([3, 4, 5, 6])], measure=confidence)
    >>> sorted(profile.up + profile.down)
    [(0, 0), (0, 1)]
    """
    if not probe > 1:
        raise ValueError(f"profile_zero_tuning needs a probe greater than 1, got {probe!r}")
    if not examples:
        raise ValueError("no examples were given")
    heads = every_head(model, examples[0].token_ids) if heads is None else heads
    up: list[Head] = []
    down: list[Head] = []
    groups = [[head] for head in heads] if each_layer else _by_number(heads)
    plain = mean_measure(model, examples, measure, lambda batch: ())
    for number, group in enumerate(groups):
        score = _score(model, examples, measure, probe, group)
        if score != plain:
            (up if score > plain else down).extend(group)
        if progress is not None:
            progress(number + 1, len(groups))
    return ZeroTuningProfile(sorted(up), sorted(down))


def calibrate_zero_tuning(
    model: Module,
    examples: Sequence[Example],
    measure: Measure = accuracy,
    factors: Sequence[float] = _FACTORS,
    probe: float = 2.0,
    each_layer: bool = False,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> ZeroTuning:
    """Profile the heads, then find γ for the larger group; 1 where none does better than no edit.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with an answer, unless the measure needs none.
        measure: `accuracy` or `answer_probability` (supervised), or `confidence` (unsupervised).
        factors: the γ to try, for up-effective heads those above 1, for down-effective ones those below.
        probe, each_layer, heads: as for `profile_zero_tuning`.
        progress: called during the profiling.

    Raises:
        ValueError: no head makes a difference.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from regard.steer.language import confidence
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20, initializer_range=0.3)).eval()
    >>> found = calibrate_zero_tuning(model, [Example([3, 4, 5, 6])], measure=confidence, factors=[0.5, 2])
    >>> found.score >= found.plain_score
    True
    """
    profile = profile_zero_tuning(model, examples, measure, probe, each_layer, heads, progress)
    group = profile.dominant
    if not group:
        raise ValueError(
            f"no head makes a difference to the measure on {len(examples)} examples; pass more of them, or a finer measure "
            "such as answer_probability"
        )
    plain = mean_measure(model, examples, measure, lambda batch: ())
    tried = [by for by in factors if (by > 1 if group is profile.up else by < 1)]
    scores = {1.0: plain} | {by: _score(model, examples, measure, by, group) for by in tried}
    best = max(scores, key=scores.__getitem__)
    return ZeroTuning(zero_tuning(best, group), best, scores[best], plain, profile)


def _score(model: Module, examples: Sequence[Example], measure: Measure, by: float, heads: Sequence[Head]) -> float:
    return mean_measure(model, examples, measure, lambda batch: (zero_tuning(by, heads),))


def _by_number(heads: Sequence[Head]) -> list[list[Head]]:
    numbers = sorted({head for _, head in heads})
    return [[pair for pair in heads if pair[1] == number] for number in numbers]
