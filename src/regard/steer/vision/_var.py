"""Visual attention redistribution: what visual sinks collect, given to the rest of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, check_number, key_set, query_set
from regard.steer.redistribute import move
from regard.steer.vision._prompt import Inputs, Prompt, masses, read_prompt
from regard.tokens import Where, decoder_layers


@dataclass(frozen=True, repr=False)
class RedistributeSinks(Edit):
    """``P'_ij = (1 − p) P_ij`` on sinks, ``P_ij + p Σ_sinks P_i · P_ij / Σ_I∖Î P_i`` on the image's other tokens I∖Î.

    Only for image-centric pairs of head and query: those that give the image at least ``least`` and that give at least the
    part ``ratio`` of it to tokens that are no sinks, ``Σ_I∖Î P_i / Σ_I P_i ≥ ρ``. Every row keeps its sum.

    Args:
        sinks: keys that collect attention, of the text and of the image.
        image: keys of the image, its sinks included.
        ratio: ρ, from 0 to 1; the paper takes 0.8 for general tasks, 0.5 for hallucination and 0.9 for vision-centric ones.
        share: p, from 0 to 1.
        least: the attention to the image below which a head is left alone.
        queries: only these; all by default.

    Raises:
        ValueError: a number out of range.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.zeros(2, 1, 1, 4, 4)
    >>> with regard.steer(None, RedistributeSinks(sinks=[0, 1], image=[1, 2, 3], share=0.5)):
    ...     attention(q, k, torch.eye(4)[None, None])[0, 0, 0]
    tensor([0.1250, 0.1250, 0.3750, 0.3750])
    """

    places: ClassVar[tuple[str, ...]] = ("sinks", "image", "queries")

    sinks: Where
    image: Where
    ratio: float = 0.5
    share: float = 0.6
    least: float = 0.2
    queries: Where | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "share", "least"):
            check_number(self, name, 0, 1)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Two columns, for the rows that look at the image."""
        sinks, image = key_set(self.sinks, call), key_set(self.image, call)
        rest = image & ~sinks
        from_sinks, to_image, to_rest = masses(call, sinks, image, rest)
        centric = (to_image >= self.least) & (to_rest >= self.ratio * to_image)
        rows = query_set(self.queries, call, heads) & centric
        return move(call, rows, sinks, rest, self.share, (from_sinks, to_rest))


def var(
    model: Module,
    inputs: Inputs,
    ratio: float = 0.5,
    share: float = 0.6,
    least: float = 0.2,
    threshold: float = 20.0,
    dimensions: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
) -> list[RedistributeSinks]:
    """Find a prompt's sinks layer by layer, for edits that give their surplus to the rest of the image.

    A token is a sink of a layer if ``φ(x) = max_{d ∈ D} |x_d| / √(mean x²)`` of the hidden state x that enters the layer
    is at least ``threshold``; D are the dimensions in which the language model has its massive activations. Sinks of the
    text give, too. S. Kang, J. Kim, J. Kim, S. J. Hwang (2025), See What You Are Told: Visual Attention Sink in Large
    Multimodal Models.

    The edits act on the text after the image, and belong to this prompt and what is generated from it. Left out: the
    paper's lists of D for its models; without ``dimensions`` they are read off the first token, as those lists were. The
    authors' code takes ``1 − share`` for the share and ``1 − ratio`` for the ratio, which the text does not: to have what
    it does, give both so.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns: ``input_ids``, pixels and the rest.
        ratio: of `RedistributeSinks`, as are ``share`` and ``least``.
        share: the part that sinks lose.
        least: the attention to the image below which a head is left alone.
        threshold: τ.
        dimensions: D; those two in which the first token is largest, by default.
        layers: the layers to edit; all but the first two and the last by default.

    Raises:
        ValueError: no image token; no visual sink in any of the layers.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}
    >>> edits = var(model, inputs, threshold=0.1, dimensions=[3])
    >>> with torch.no_grad(), regard.steer(model, *edits):
    ...     _ = model(**inputs)
    """
    prompt = read_prompt(model, inputs)
    every = decoder_layers(model)
    chosen = every[2:-1] if layers is None else list(layers)
    unknown = [layer for layer in chosen if layer not in every]
    if unknown or not chosen:
        raise ValueError(f"var knows the layers {every[0]} to {every[-1]}, got {unknown or 'none'}")
    numbers = [every.index(layer) for layer in chosen]
    if dimensions is None:
        dimensions = _largest(model, inputs, numbers, prompt)
    scores = _sizes(model, inputs, numbers, lambda sizes: sizes[..., list(dimensions)].amax(dim=-1))
    edits = [
        RedistributeSinks(score >= threshold, prompt.image, ratio, share, least, prompt.after, layers=layer)
        for score, layer in zip(scores, chosen, strict=True)
        if bool(((score >= threshold) & prompt.image).any())
    ]
    if not edits:
        largest = max(float(score[prompt.image].max()) for score in scores)
        raise ValueError(
            f"no visual sink: in the dimensions {list(dimensions)} the image's tokens reach {largest:.3g} of the root mean "
            f"square, and the threshold is {threshold:g}; lower it, or pass the dimensions of this language model"
        )
    return edits


def _sizes(model: Module, inputs: Inputs, numbers: list[int], read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What ``read`` makes of ``|x| / √(mean x²)``, (B, N, D), of the hidden states that enter these layers, in one pass."""
    modules, paths = dict(model.named_modules()), decoder_layers(model)
    found: dict[int, Tensor] = {}

    def note(number: int, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = (args[0] if args else kwargs["hidden_states"]).float()
        found[number] = read(state.abs() * state.square().mean(dim=-1, keepdim=True).rsqrt())

    with torch.no_grad(), ExitStack() as hooks:
        for number in numbers:
            hook: Callable[..., None] = partial(note, number)
            layer = modules[paths[number].removesuffix(".*")]
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(**inputs)
    return [found[number] for number in numbers]


def _largest(model: Module, inputs: Inputs, numbers: list[int], prompt: Prompt) -> list[int]:
    """The two dimensions in which the first tokens are largest, on the mean over layers and texts."""
    first = prompt.real.int().argmax(dim=1)
    rows = torch.arange(len(first), device=first.device)
    sizes = torch.stack(_sizes(model, inputs, numbers, lambda state: state[rows, first]))
    return [int(dimension) for dimension in sizes.mean(dim=(0, 1)).topk(2).indices]
