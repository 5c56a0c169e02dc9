"""Emphasis on the image tokens that the vision tower finds informative, more in the heads that look at the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import TokenMap
from regard.runtime import Call
from regard.steer.vision._prompt import Inputs, read_prompt
from regard.steer.vision.emphasize import Emphasize
from regard.tokens import Layers, decoder_layers
from regard.watch import Statistic, watch

_VISION = "*vis*"  # vision_tower, visual, vision_model


def dual_stream(
    model: Module,
    inputs: Inputs,
    alpha: float = 0.7,
    beta: float = 0.4,
    local: float = 0.25,
    spatial: float = 0.05,
    by_head: bool = True,
    layers: Layers | None = None,
    vision_layers: Layers = _VISION,
) -> list[Emphasize]:
    """Find a prompt's informative image tokens, for edits that emphasize them at every token generated from it.

    One edit emphasizes by α the tokens that are locally informative or spatially significant, another by β those that
    summarize the image; `visual_streams` tells which. Each head is modulated by its visual sensitivity. K. H. I. Arif,
    S. A. Dip, K. Hussain, L. Zhang, C. Thomas (2025), Fixing Imbalanced Attention to Mitigate In-Context Hallucination of
    Large Vision-Language Model.

    The authors' code takes 0.3 for β. Left out: the guidance by a run without the image that it can add. That code
    knows no modulation of heads and the abstract gives no formula for it: measuring it as the head's attention to the
    image, relative to the layer's most visual head, is this library's reading; ``by_head=False`` leaves it out.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        alpha: of the informative tokens.
        beta: of the summary tokens.
        local: of `visual_streams`.
        spatial: of `visual_streams`.
        by_head: modulate each head by its visual sensitivity.
        layers: the layers to edit; all but the first two by default.
        vision_layers: the calls of the vision tower.

    Raises:
        ValueError: no image token; no vision tower; a number of patches that does not fit the tokens.

    >>> import torch, regard, transformers
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    >>> vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    >>> text = transformers.LlamaConfig(**sizes, vocab_size=60)
    >>> config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=59)
    >>> model = transformers.LlavaForConditionalGeneration(config).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 59, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    >>> with torch.no_grad(), regard.steer(model, *dual_stream(model, inputs)):
    ...     _ = model(**inputs)
    """
    informative, summary = visual_streams(model, inputs, local, spatial, vision_layers)
    chosen = decoder_layers(model)[2:] if layers is None else layers
    image = read_prompt(model, inputs).image if by_head else None
    streams = [(informative, alpha), (summary, beta)]
    return [Emphasize(keys, by, image, layers=chosen) for keys, by in streams if bool(keys.any())]


def visual_streams(
    model: Module, inputs: Inputs, local: float = 0.25, spatial: float = 0.05, vision_layers: Layers = _VISION
) -> tuple[Tensor, Tensor]:
    """The informative and the summary tokens of an image, (batch, tokens) booleans each, which share none.

    Locally informative is the part ``local`` of the tokens that the class token looks at most in the vision tower's first
    layer, spatially significant the part ``spatial`` that all patches look at most there. Summary tokens are the outliers of
    the class token's attention in the last layer but one: above the third quartile by more than one and a half times the
    distance of the quartiles. A summary token does not count as informative. Where a tower has no class token, what all
    patches look at takes its place, and where several patches make one token, their sum.

    The authors' code adds up each row where it looks for spatially significant patches, which is 1 for all; this adds up
    columns, what a patch receives. The tower has to keep patches in the order of the image's tokens, as CLIP's and Qwen2-VL's
    do; those that sort them by window, as Qwen2.5-VL's does, are refused.

    Args:
        model: a transformers vision–language model.
        inputs: what its processor returns.
        local: from 0 to 1.
        spatial: from 0 to 1.
        vision_layers: the calls of the vision tower.

    Raises:
        ValueError: parts out of range; no image token; no vision tower; a number of patches that does not fit the tokens.

    >>> import torch, transformers
    >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    >>> vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    >>> text = transformers.LlamaConfig(**sizes, vocab_size=60)
    >>> config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=59)
    >>> model = transformers.LlavaForConditionalGeneration(config).eval()
    >>> inputs = {"input_ids": torch.tensor([[1, 59, 59, 59, 59, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    >>> informative, summary = visual_streams(model, inputs, local=0.5)
    >>> int((informative | summary).sum()) >= 2
    True
    """
    for name, part in (("local", local), ("spatial", spatial)):
        if not 0 <= part <= 1:
            raise ValueError(f"visual_streams needs {name} to be from 0 to 1, got {part}")
    sorts = next((type(module).__name__ for module in model.modules() if hasattr(module, "get_window_index")), None)
    if sorts:
        raise ValueError(f"{sorts} sorts an image's patches by window, so that they cannot be told apart here")
    prompt = read_prompt(model, inputs)
    counts = prompt.image.sum(dim=1).tolist()
    first, late = _tower_gaze(model, inputs, vision_layers, sum(counts))
    informative, summary = torch.zeros_like(prompt.image), torch.zeros_like(prompt.image)
    rows = zip(first.split(counts, dim=1), late.split(counts, dim=1), strict=True)
    for row, (early, later) in enumerate(rows):
        outlying = outliers(later[0])
        chosen = largest(early[0], local) | largest(early[1], spatial)
        informative[row, prompt.image[row]] = (chosen & ~outlying).to(informative.device)
        summary[row, prompt.image[row]] = outlying.to(summary.device)
    return informative, summary


def largest(values: Tensor, part: float) -> Tensor:
    """Which values are among this part of the largest."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(int(len(values) * part)).indices] = True
    return chosen


def outliers(values: Tensor) -> Tensor:
    """Which values lie above the third quartile by more than 1.5 times the distance of the quartiles."""
    low, high = values.quantile(0.25), values.quantile(0.75)
    return torch.gt(values, high + 1.5 * (high - low))


class _Gaze(Statistic):
    """What the first query gives to each key, and what each key receives on the mean: (batch, heads, 2, key)."""

    name = "gaze"
    dims = ("stream", "key")

    def measure(self, attention: TokenMap, call: Call) -> Tensor:
        received = attention.received() / attention.shape[2]
        return torch.stack([attention.rows([0])[:, :, 0], received], dim=2)


def _tower_gaze(model: Module, inputs: Inputs, layers: Layers, tokens: int) -> tuple[Tensor, Tensor]:
    """What `_Gaze` sees in the tower's first layer and in its last but one, (2, tokens) each."""
    with torch.no_grad(), watch(model, _Gaze(), layers=layers) as seen:
        model(**inputs)
    gaze = seen.dataset().gaze.values
    by_layer: dict[str, list[Tensor]] = {}
    for number, path in enumerate(seen.layers):  # a tower may attend image by image: path, path#1, …
        by_layer.setdefault(path.partition("#")[0], []).append(torch.from_numpy(gaze[number]))
    found = [_per_token(torch.stack(parts), tokens) for parts in by_layer.values()]
    return found[0], found[max(len(found) - 2, 0)]


def _per_token(gaze: Tensor, tokens: int) -> Tensor:
    """(2, tokens) from what one layer's calls saw (calls, batch, heads, 2, patches), NaN where a call was shorter."""
    among = gaze.nan_to_num().sum(dim=2)
    seen = ~gaze.isnan().all(dim=(2, 3))
    streams = torch.stack([among[:, :, stream][seen] for stream in (0, 1)])
    per_call = [int(number) for number in seen.sum(dim=-1).flatten() if number]
    patches = sum(per_call)
    if patches - len(per_call) == tokens:  # a class token stands before the patches of each image
        kept = torch.cat([torch.arange(number) > 0 for number in per_call])
        return streams[:, kept]
    if patches % tokens:
        raise ValueError(
            f"{tokens} image tokens do not come of {patches} patches in {len(per_call)} images: the tower reduces them in "
            "a way that is not known here; choose the calls with vision_layers=, or find the tokens yourself for Emphasize"
        )
    return streams[1].reshape(tokens, -1).sum(dim=-1).expand(2, -1)
