"""ACT: take attention from the sinks beyond the first token, input by input, on the heads for which that helps.

A key j > 0 is a sink of a head if its mean share over the queries that see it is above a threshold:

    Σ_i P_ij / |{i that see j}| > threshold = 0.1

On chosen heads the sinks S keep a part of their weight, and what is freed goes to the other keys, the first among them:

    P'_ij = β P_ij                                for j in S,   β = 0.4
    P'_ij = P_ij (1 + (1 − β) m_i / (1 − m_i))    for the others,   m_i = Σ_{j in S} P_ij

Every row keeps its sum; a row that sees sinks only is left alone.

Z. Yu, Z. Wang, Y. Fu, H. Shi, K. Shaikh, Y. C. Lin (2024), Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large
Language Models without Training through Attention Calibration. Heads are chosen as there: those with which alone calibrated
the model does better on held-out examples than it does plainly, the first two layers and the last left out.

The authors' code drops the first sink that it finds, which is the first token wherever that is one; here the first token is
no sink by position. A decoding step has one query, whose row says little about sinks: to calibrate ``generate``, have
`find_sinks` find those of the prompt first. Texts are read without padding, whose queries would count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, edited_map
from regard.steer.edit import Edit, check_number, column, hiding, key_set
from regard.steer.language.example import Example, Measure, Progress, accuracy, mean_measure, next_logits
from regard.steer.language.heads import Head, every_head, only, score_each
from regard.tokens import Where
from regard.watch import Sinks, watch


@dataclass(frozen=True, repr=False)
class CalibrateSinks(Edit):
    """The edit: sinks lose ``1 − by`` of their weight to the other keys of each row.

    Args:
        by: β, from 0 to 1.
        threshold: the least mean share of a sink.
        first: positions that are never taken for a sink.
        sinks: (heads, tokens) or (batch, heads, tokens) booleans, for keys known to be sinks; by default those of the
            queries at hand.

    Raises:
        ValueError: β or the threshold out of range, sinks of another shape.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.ones(1, 1, 4, 1), torch.tensor([0.0, 0.0, 2.0, 0.0]).view(1, 1, 4, 1)
    >>> attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.0963, 0.0963, 0.7112, 0.0963])
    >>> with regard.steer(None, CalibrateSinks(by=0.4, threshold=0.5)):
    ...     attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.2385, 0.2385, 0.2845, 0.2385])
    """

    places: ClassVar[tuple[str, ...]] = ("first",)

    by: float = 0.4
    threshold: float = 0.1
    first: Where = 0
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        check_number(self, "by", 0, 1)
        check_number(self, "threshold", 0, 1)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """One column for each head that has sinks: heads differ in their sinks."""
        chosen = heads.expand(call.query.shape[1]).nonzero().flatten().tolist()
        attention = edited_map(call).heads(chosen)
        if self.sinks is None:
            with torch.no_grad():
                share = attention.received() / attention.viewers().clamp(min=1)
            sinks = (share > self.threshold) & ~key_set(self.first, call)[:, None]
        else:
            sinks = _given(self.sinks, call)[:, chosen]
        both = torch.stack([sinks, ~sinks], dim=-1).to(attention.dtype)
        to_sinks, to_others = (attention @ both).unbind(-1)
        term = math.log(self.by or 1) - torch.log1p((1 - self.by) * to_sinks / to_others.where(to_others > 0, 1.0))
        columns = []
        for place, head in enumerate(chosen):
            if not bool(sinks[:, place].any()):
                continue
            rows = (to_others[:, place] > 0)[:, None] & _only(head, call)
            if self.by == 0:
                columns.append(hiding(rows, sinks[:, place], call))
            else:
                columns.append(column(rows, term[:, place, None], sinks[:, place], call))
        return replace(call, columns=(*call.columns, *columns))


def find_sinks(
    model: Module, token_ids: Sequence[int] | Tensor, threshold: float = 0.1, first: int = 0
) -> dict[int, Tensor]:
    """The sinks of one text beyond its first token: for each layer (heads, tokens) booleans.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> find_sinks(model, [3, 4, 5, 6])[1].shape
    torch.Size([2, 4])
    """
    with torch.no_grad(), watch(model, Sinks(threshold)) as seen:
        next_logits(model, token_ids)
    sinks = seen.dataset().sinks.isel(batch=0)
    found = {layer: torch.as_tensor(sinks.isel(layer=layer).values) > 0 for layer in range(sinks.sizes["layer"])}
    for of_layer in found.values():
        of_layer[:, first] = False
    return found


def act(
    heads: Sequence[Head], by: float = 0.4, threshold: float = 0.1, sinks: dict[int, Tensor] | None = None
) -> tuple[CalibrateSinks, ...]:
    """The edits that calibrate heads.

    Args:
        heads: pairs (layer, head), as `find_act_heads` finds them.
        by: β.
        threshold: the least mean share of a sink.
        sinks: those of a prompt that `find_sinks` found, to go on with in ``generate``; found in each call by default.

    >>> act([(2, 0), (3, 1)])
    (CalibrateSinks(layers=[2, 3], heads={2: [0], 3: [1]}),)
    """
    if sinks is None:
        return (CalibrateSinks(by, threshold, **only(heads)),)
    chosen = only(heads)
    lost = [layer for layer in chosen["layers"] if layer not in sinks]
    if lost:
        raise ValueError(f"sinks are given for the layers {sorted(sinks)}, but heads of layer {lost[0]} are chosen")
    return tuple(
        CalibrateSinks(by, threshold, sinks=sinks[layer], layers=layer, heads=chosen["heads"][layer])
        for layer in chosen["layers"]
        if bool(sinks[layer][chosen["heads"][layer]].any())
    )


def find_act_heads(
    model: Module,
    examples: Sequence[Example],
    by: float = 0.4,
    threshold: float = 0.1,
    measure: Measure = accuracy,
    heads: Sequence[Head] | None = None,
    progress: Progress | None = None,
) -> list[Head]:
    """The heads with which alone calibrated a model does better than plainly, the best first.

    Args:
        model: a language model that takes ``input_ids``.
        examples: with an answer, of all tasks that matter; the authors' code takes 900 of each of its own.
        by, threshold: as for `CalibrateSinks`.
        measure: of the logits of the next token.
        heads: those to try; by default all, but those of the first two layers and the last where there are more than three.
        progress: called with the number of heads done and in all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from regard.steer.language import answer_probability
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    ...                                      intermediate_size=16, vocab_size=20)).eval()
    >>> found = find_act_heads(model, [Example([3, 4, 5, 6], answer=7)], measure=answer_probability)
    >>> set(found) <= {(0, 0), (0, 1), (1, 0), (1, 1)}
    True
    """
    plain = mean_measure(model, examples, measure, lambda batch: ())
    tried = _between(every_head(model, examples[0].token_ids)) if heads is None else heads
    scores = score_each(
        model, examples, measure, lambda head: lambda batch: act([head], by, threshold), tried, progress
    )
    better = [head for head, score in scores.items() if score > plain]
    return sorted(better, key=scores.__getitem__, reverse=True)


def _between(heads: Sequence[Head]) -> list[Head]:
    last = max(layer for layer, _ in heads)
    return [(layer, head) for layer, head in heads if last < 3 or 2 <= layer < last]


def _only(head: int, call: AttentionCall) -> Tensor:
    """(1, H, 1) boolean."""
    return (torch.arange(call.query.shape[1], device=call.query.device) == head)[None, :, None]


def _given(sinks: Tensor, call: AttentionCall) -> Tensor:
    """(B|1, H, M) boolean: the call's keys among those known; tokens that came later are none."""
    batch, heads, _, _ = call.query.shape
    known = sinks if sinks.ndim == 3 else sinks[None]
    if known.dtype != torch.bool or known.ndim != 3 or known.shape[1] != heads or known.shape[0] not in (1, batch):
        raise ValueError(
            f"CalibrateSinks needs sinks as booleans of shape ({heads}, tokens) or ({batch}, {heads}, tokens) for "
            f"{call.place.path}, got {sinks.dtype} {tuple(sinks.shape)}"
        )
    end = call.place.key_start + call.key.shape[2]
    known = torch.nn.functional.pad(known, (0, max(end - known.shape[2], 0)))
    return known[..., call.place.key_start : end].to(call.query.device)
