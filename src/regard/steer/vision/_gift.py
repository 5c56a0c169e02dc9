"""Gaze shifts: what the question makes a model look at, kept in view together with the question while it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import TokenMap
from regard.runtime import AttentionCall, Call
from regard.steer.edit import Edit, check_number, column, key_set
from regard.steer.vision._prompt import Inputs, last_query, last_row, masses, per_key, read_prompt
from regard.tokens import Layers, Where, decoder_layers
from regard.watch import Statistic, watch

_ROWS_AT_ONCE = 32


@dataclass(frozen=True, repr=False)
class FuseGaze(Edit):
    """``P'_ij ∝ P_ij exp(α S_j)`` for the image's tokens j, ``P_ij · β r`` for those of the question, i the last query.

    S is a saliency map from 0 to 1. The image's part is edited in the half of the heads that look at the image most; what it
    gains there, ``r = Σ_h,j P exp(α S) / Σ_h,j P`` over those heads, the question gains in the half of the heads that look
    at the question most. Rows are renormalised.

    Args:
        saliency: S (batch, tokens), of a tensor or of lists.
        image: keys.
        question: keys.
        alpha: at least 0.
        beta: greater than 0; 1 keeps the balance of image and question.

    Raises:
        ValueError: a number out of range; a saliency that is no (batch, tokens).

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 3, 4)
    >>> edit = FuseGaze(torch.tensor([[0.0, 1.0, 0.0]]), image=[0, 1], question=[2], alpha=1.0)
    >>> with regard.steer(None, edit):
    ...     attention(q, k, torch.eye(3, 4)[None, None])[0, 0, 1:]
    tensor([[0.3333, 0.3333, 0.3333, 0.0000],
            [0.1793, 0.4874, 0.3333, 0.0000]])
    """

    places: ClassVar[tuple[str, ...]] = ("image", "question")

    saliency: Sequence[Sequence[float]] | Tensor
    image: Where
    question: Where
    alpha: float = 5.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "alpha", low=0)
        check_number(self, "beta", low=1e-6)
        shape = tuple(torch.as_tensor(self.saliency).shape)
        if len(shape) != 2:
            raise ValueError(f"FuseGaze needs a saliency of shape (batch, tokens), got {shape}")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Two columns for the last query."""
        image, question = key_set(self.image, call), key_set(self.question, call)
        saliency = per_key(torch.as_tensor(self.saliency), call) * image
        guided = torch.exp(self.alpha * saliency) * image
        to_image, to_question, gained = (mass[..., 0] for mass in masses(last_query(call), image, question, guided))
        looking, reading = top_half(to_image), top_half(to_question)
        ratio = (gained * looking).sum(dim=1) / (to_image * looking).sum(dim=1).clamp(
            min=torch.finfo(gained.dtype).tiny
        )
        louder = torch.log(ratio.clamp(min=1.0))[:, None, None] + math.log(self.beta)
        row = last_row(call, heads)
        seen = column(row & looking[..., None], self.alpha, saliency, call)
        read = column(row & reading[..., None], louder, question, call)
        return replace(call, columns=(*call.columns, seen, read))


def gift(
    model: Module,
    inputs: Inputs,
    alpha: float = 5.0,
    beta: float = 1.0,
    words: Tensor | None = None,
    question: Tensor | None = None,
    saliency_layers: Layers | None = None,
    layers: Layers | None = None,
) -> FuseGaze:
    """Read a prompt's gaze shifts, for an edit that guides every token generated from it.

    The method is Gaze Shift-Guided Cross-modal Fusion Enhancement; the rules are those of `gaze_saliency` and `FuseGaze`.
    Z. Qi, C. Shang, E. Spiliopoulou, N. Pappas (2025), Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement
    for VLM Hallucination Mitigation.

    Left out: the tagger that tells a question's nouns, verbs, adjectives, adverbs, names and numbers from its other words:
    say with ``words`` where they stand. And the search for the layers, which the paper does once for each model.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        alpha: of the saliency; the authors take 4 or 5.
        beta: of the question.
        words: (batch, tokens) boolean, the question's words that say much; all of the question by default.
        question: (batch, tokens) boolean; the text after the image by default, a chat template's end included.
        saliency_layers: among these, the layer with the largest shifts tells the saliency; all by default.
        layers: the layers to edit; by default 12 to 22 of 32, the authors' for LLaVA-1.5 7B, in proportion.

    Raises:
        ValueError: no image token, no question.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}
    >>> with torch.no_grad(), regard.steer(model, gift(model, inputs)):
    ...     _ = model(**inputs)
    """
    prompt = read_prompt(model, inputs)
    question = prompt.question if question is None else question
    saliency = gaze_saliency(model, inputs, question if words is None else words, saliency_layers)
    every = decoder_layers(model)
    first, last = (round(len(every) * number / 32) for number in (12, 23))
    chosen = every[first:last] if layers is None else layers
    return FuseGaze(saliency, prompt.image, question, alpha, beta, layers=chosen)


def gaze_saliency(model: Module, inputs: Inputs, words: Tensor, layers: Layers | None = None) -> Tensor:
    """How much a question draws attention to each token of the image: (batch, tokens), from 0 to 1, and 0 elsewhere.

    ``S_j = mean_h,i max(P_h,i,j − P_h,i−1,j, 0)`` over the words i and the half of the heads that shift most, clamped to
    three standard deviations around its mean and stretched to 0 … 1, from the layer with the largest shifts. Attention that
    stays where it was, a sink's, counts for nothing.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        words: (batch, tokens) boolean, the words to follow.
        layers: the layers to compare; all of the language model's by default.

    Raises:
        ValueError: no image token; words of another shape, or none in a text.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, image_token_id=59)).eval()
    >>> ids = torch.tensor([[1, 59, 59, 59, 7, 8]])
    >>> gaze_saliency(model, {"input_ids": ids}, words=ids == 8).shape
    torch.Size([1, 6])
    """
    prompt = read_prompt(model, inputs)
    if words.shape != prompt.ids.shape or words.dtype != torch.bool:
        raise ValueError(
            f"words must be booleans of shape {tuple(prompt.ids.shape)}, got {words.dtype} {tuple(words.shape)}"
        )
    if not bool(words.any(dim=1).all()):
        raise ValueError("a text has no word to follow: no text comes after its image; pass words")
    statistic = _Shifts(words)
    with torch.no_grad(), watch(model, statistic, layers=decoder_layers(model) if layers is None else layers) as seen:
        model(**inputs)
    shifts = torch.from_numpy(seen.dataset().shifts.values).to(words.device).movedim(0, 1) * prompt.image[:, None, None]
    shifts = (shifts * top_half(shifts.sum(dim=-1), dim=2)[..., None]).sum(dim=2)  # (batch, layer, key)
    best = shifts.sum(dim=-1).argmax(dim=1)
    rows = [stretch(row[int(layer)], image) for row, layer, image in zip(shifts, best, prompt.image, strict=True)]
    return torch.stack(rows)


def top_half(values: Tensor, dim: int = 1) -> Tensor:
    """Whether each value is among the largest half along a dimension, at least one."""
    number = max(values.shape[dim] // 2, 1)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    return chosen.scatter(dim, values.topk(number, dim=dim).indices, True)


def stretch(values: Tensor, image: Tensor) -> Tensor:
    """Values (tokens,) of an image's tokens, clamped to three standard deviations and stretched to 0 … 1; 0 elsewhere."""
    among = values[image]
    mean, deviation = among.mean(), among.std(correction=min(1, len(among) - 1))
    among = among.clamp(mean - 3 * deviation, mean + 3 * deviation)
    span = among.max() - among.min()
    result = torch.zeros_like(values)
    result[image] = (among - among.min()) / span if span > 0 else torch.zeros_like(among)
    return result


class _Shifts(Statistic):
    """``Σ_i max(P_ij − P_i−1,j, 0)`` over words i: (batch, heads, key)."""

    name = "shifts"
    dims = ("key",)

    def __init__(self, words: Tensor) -> None:
        self.words = words

    def measure(self, attention: TokenMap, call: Call) -> Tensor:
        anywhere = self.words.any(dim=0)
        anywhere[0] = False  # has no token before it
        total = torch.zeros(*attention.shape[:2], attention.shape[3], dtype=attention.dtype, device=attention.device)
        for rows in anywhere.nonzero()[:, 0].split(_ROWS_AT_ONCE):
            shift = (attention.rows(rows) - attention.rows(rows - 1)).clamp(min=0)
            total += (shift * self.words[:, rows].to(shift)[:, None, :, None]).sum(dim=2)
        return total
