"""Vision-aware heads, found by what becomes of their output without the image, and reinforced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, run
from regard.steer import steer
from regard.steer.edit import Edit
from regard.steer.gate import Gate
from regard.steer.vision._prompt import Inputs, Prompt, last_query, read_prompt
from regard.tokens import Layers, decoder_layers


def vhr(model: Module, inputs: Inputs, by: float = 2.0, layers: Layers | None = None) -> Gate:
    """Find a prompt's vision-aware heads, for an edit that strengthens them: ``O' = by · P V``.

    The divergence of head i is ``VHD_i = ‖A_i(y | image, text) − A_i(y | text)‖``, A its output for the token that is
    generated first. Heads that surge without the image do not count: ``VHD_i = 0`` where VHD_i and ``‖A_i(y | text)‖²`` both
    exceed their mean over the layer by a standard deviation. The heads above the layer's median are reinforced. Layer by
    layer: those of one layer are found while the layers before it are reinforced already, in one pass for both texts.
    J. He et al. (2025), Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence.

    The heads belong to this prompt, and hold for all of its tokens and those generated from it. Left out: the divergence
    of later tokens (T-VHD), which the paper uses for analysis only.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns for one text.
        by: α.
        layers: the layers to reinforce; the second and the last 14 of 32 by default, as many in proportion in other models.

    Raises:
        ValueError: several texts; no image token.

    >>> import torch, regard
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, image_token_id=59)).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 7, 8]])}
    >>> edit = vhr(model, inputs)
    >>> {layer: len(heads) for layer, heads in edit.heads.items()}
    {'model.layers.1.self_attn': 2, 'model.layers.2.self_attn': 2, 'model.layers.3.self_attn': 2}
    >>> with torch.no_grad(), regard.steer(model, edit):
    ...     _ = model(**inputs)
    """
    prompt = read_prompt(model, inputs)
    if len(prompt.ids) > 1:
        raise ValueError(f"vhr finds the heads of one text, got a batch of {len(prompt.ids)}; pass one at a time")
    every = decoder_layers(model)
    default = dict.fromkeys([*every[1:2], *every[-max(1, round(len(every) * 14 / 32)) :]])
    search = _Reinforce(by, layers=list(default) if layers is None else layers)
    with torch.no_grad(), steer(model, search):
        model(**_with_text_alone(inputs, prompt))
    return Gate(by, layers=list(search.found), heads=search.found)


def vision_aware_heads(seen: Tensor, unseen: Tensor) -> Tensor:
    """Which heads of a layer are vision-aware, (heads,) boolean, from their outputs (heads, width) with and without an image.

    >>> import torch
    >>> seen = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]])
    >>> vision_aware_heads(seen, torch.zeros(4, 2))
    tensor([ True,  True, False, False])
    """
    divergence = torch.linalg.vector_norm(seen.float() - unseen.float(), dim=-1)
    text_alone = unseen.float().square().sum(dim=-1)
    divergence = divergence.masked_fill(_stands_out(divergence) & _stands_out(text_alone), 0.0)
    return torch.gt(divergence, divergence.median())


def _stands_out(values: Tensor) -> Tensor:
    return torch.gt(values, values.mean() + values.std())


@dataclass(frozen=True, repr=False)
class _Reinforce(Edit):
    """Finds a layer's heads from a batch of two, the text with the image and the text alone, and reinforces them."""

    by: float
    found: dict[int | str, list[int]] = field(default_factory=dict)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        seen, unseen = run(last_query(call))[:, :, 0]
        chosen = vision_aware_heads(seen, unseen)
        self.found[call.place.path] = chosen.nonzero()[:, 0].tolist()
        return Gate(self.by).apply(call, chosen)


def _with_text_alone(inputs: Inputs, prompt: Prompt) -> Inputs:
    """A batch of two: the text with the image, and without its tokens, padded on the left to the same length."""
    kept = (prompt.real & ~prompt.image)[0]
    missing = len(kept) - int(kept.sum())
    order = torch.cat([kept.logical_not().nonzero()[:, 0], kept.nonzero()[:, 0]])
    doubled = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == prompt.ids.shape:
            doubled[name] = torch.cat([value, value[:, order]])
    # What stands in the padding is not seen, but no image token may be there: the image's features go to those.
    doubled["input_ids"][1, :missing] = prompt.ids[0, kept][0]
    if "mm_token_type_ids" in doubled:
        doubled["mm_token_type_ids"][1, :missing] = 0
    mask = torch.ones_like(doubled["input_ids"])
    mask[0], mask[1, :missing] = prompt.real[0], 0
    return doubled | {"attention_mask": mask}
