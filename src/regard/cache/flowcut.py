"""The image tokens through which information flows in the vision encoder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.nn.functional import pad

from regard.cache._images import _ImagePolicy, at_entries, best
from regard.cache.policy import Entries
from regard.maps import TokenMap
from regard.runtime import AttentionCall, HiddenCall, Place, Proceed, Reading, Site, entered
from regard.tokens import Where

_ENCODERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")  # as transformers names them
_CLASS_TOKENS = ("class_embedding", "cls_token")


@dataclass(frozen=True, kw_only=True)
class FlowCut(_ImagePolicy):
    """Keep the image tokens that the vision encoder's class token relays information of, cut step by step over its layers:

    ``S = (I_a + I_s) I_d`` and, from layer to layer, ``C ← (C + S) / 2``. ``I_a`` is the class token's attention to the
    tokens left, ``I_s`` the softmax of ``v_class·v_j`` over them, each the mean over heads and of sum 1, and
    ``I_d = ‖mean_h v_j‖₁``. After every second of the encoder's layers, the ``(N − T) / √L · (1 − (H / ln N)²)``
    tokens of the smallest C go: N are left, T are wanted, H is the entropy of ``I_a``, and L layers follow, the last of which
    cuts to T. Without a class token, the mean of the queries and of the values left stands for it.

    Args:
        budget: T, image tokens of each image (of each frame of a video): a number of them, or a share. The paper takes 192,
            128 and 64 of LLaVA-1.5's 576; of Qwen2-VL's 1/3, 2/9 and 1/9.
        rest: what becomes of the others, as for every `BudgetPolicy`.
        image: positions, a boolean mask, or a function of token ids; by default the tokens that the model's config names.

    The encoder is read, not changed. Tokens that are cut count in no later layer, as receivers, in the means or in the
    entropy; but those that are left go on looking at them inside the encoder, and the prompt is read with all of them: what
    is generated sees what is left. Nothing of the encoder's or the prompt's time is saved. Of `regard.steer`'s edits in the
    encoder, those that add to its logits do not count. Where a token merges patches (2×2 for Qwen2-VL), they are cut
    together, by the mean of their S. Left out: the further cut in the second layer of the language model for LLaVA-NeXT and
    Qwen2-VL, and the same number cut from all images of a batch. The authors' code has no ``I_s`` where there is no class
    token; the text does. Not found: whether the text has another similarity for ``I_s`` than the code, whose it is here.

    J. Tong et al. (2025), FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models.

    Raises:
        ValueError: a model without a vision encoder, or whose image tokens are not its patches one for one or in merged
            blocks of them (LLaVA-NeXT's tiles, Qwen2.5-VL's windows); a text without any image token.

    >>> import regard
    >>> print(regard.cache.FlowCut(budget=128))
    FlowCut(budget=128)
    """

    @contextmanager
    def beside(self, model: Module) -> Iterator[_Encoder]:
        """What is left of the images, by the encoder's own attention."""
        encoder = _Encoder(model, self)
        with entered(encoder, encoder.module):
            yield encoder

    def score(self, entries: Entries) -> Tensor:
        """1 for text and what is left of the image, 0 for the rest of it."""
        if entries.layer == 0:
            image = self.new_image(entries, entries.beside.image)
            entries.memory[FlowCut] = entries.beside.stay(image)
        return at_entries(entries.memory[FlowCut], entries)


@dataclass
class _Cut:
    """Images of one attention call, (images, tokens): which tokens are ``left``, and how important they were so far."""

    left: Tensor
    target: Tensor
    importance: Tensor | None = None

    def go_on(self, attention: Tensor, importance: Tensor, to_come: int) -> None:
        """Count a layer, and cut if it is time to; ``to_come`` layers follow."""
        self.importance = importance if self.importance is None else (self.importance + importance) / 2
        if to_come % 2:
            return
        number = self.left.sum(dim=1)
        spread = torch.special.entr(attention).sum(dim=1) / number.clamp(min=2).log()
        share = (1 - spread**2) / math.sqrt(to_come) if to_come else torch.ones_like(spread)
        gone = ((number - self.target) * share).round().long()
        self.left = best(self.importance, self.left, (number - gone).maximum(self.target))


class _Encoder:
    """Follows a model's vision encoder, and knows what is left of the images of its last run."""

    def __init__(self, model: Module, policy: FlowCut) -> None:
        self.image: Where = policy.image_of(model)
        self._policy = policy
        self._path, self.module = _encoder_of(model)
        self._name = f"the vision encoder of {type(model).__name__} ({self._path})"
        self._stack, layers = _layers_of(self.module)
        parameters = [name.rpartition(".")[2] for name, _ in self.module.named_parameters()]
        self._class_token = any(name in parameters for name in _CLASS_TOKENS)
        self._last = max(_used(model, layers) - (2 if self._class_token else 1), 0)  # the last that cuts
        self._merged = int(getattr(self.module, "spatial_merge_size", 1)) ** 2
        self._run = -1
        self._cuts: dict[str, _Cut] = {}  # by the number of the call among those of its layer

    edits = outermost = False

    def wants(self, site: Site) -> bool:
        """Calls of the layers that cut."""
        found = self._layer(site.path)
        return found is not None and found <= self._last

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """Count the call that is run in the end."""
        return proceed(call.with_reading(Reading(partial(self._ask, call.place))))

    def _ask(self, place: Place, attention: TokenMap, last: AttentionCall) -> Callable[[], None]:
        if place.pass_index != self._run:
            self._run, self._cuts = place.pass_index, {}
        number = place.path.partition("#")[2]
        return partial(self._count, last.at(place), number, self._layer(place.path) or 0)

    def _layer(self, path: str) -> int | None:
        found = re.match(rf"{re.escape(self._stack)}\.(\d+)(?:\.|$)", path)
        return None if found is None else int(found[1])

    def _count(self, call: AttentionCall, number: str, layer: int) -> None:
        images, patches = call.query.shape[0], call.query.shape[2] - self._class_token
        if layer == 0:
            left = torch.ones(images, patches // self._merged, dtype=torch.bool, device=call.query.device)
            self._cuts[number] = _Cut(left, self._policy.targets(left.sum(dim=1)))
        cut = self._cuts.get(number)
        masked = call.rule is not None or (call.attn_mask is not None and not _all_visible(call.attn_mask))
        if masked or cut is None or (images, patches) != (cut.left.shape[0], cut.left.shape[1] * self._merged):
            raise ValueError(
                f"FlowCut follows patches from layer to layer, but {self._name} does not attend to the same ones in each: "
                f"{call.place.path} has a call of {images} × {patches} patches{', some masked' * masked}. ImageRank works "
                "without"
            )
        left = cut.left.repeat_interleave(self._merged, dim=1)
        attention, importance = (t.unflatten(1, (-1, self._merged)) for t in flow(call, left, self._class_token))
        cut.go_on(attention.sum(dim=2), importance.mean(dim=2), self._last - layer)

    def stay(self, image: Tensor) -> Tensor:
        """(batch, tokens) boolean: everything but what was cut of the image tokens, for which the encoder ran last."""
        cuts, self._cuts = list(self._cuts.values()), {}
        expected, tokens = sum(cut.left.numel() for cut in cuts), int(image.sum())
        if not tokens:
            return ~image
        if not cuts:
            raise ValueError(
                f"FlowCut goes by the attention of {self._name}, and saw none of the {tokens} image tokens of this prompt: "
                'give the model its pixels, and call model.set_attn_implementation("sdpa") first'
            )
        beams = max(tokens // expected, 1)  # of a text: they follow one another, and the encoder reads their image once
        texts = image[::beams]
        if int(texts.sum()) != expected or not torch.equal(texts.repeat_interleave(beams, dim=0), image):
            raise ValueError(
                f"FlowCut cannot tell which patches the image tokens are: {self._name} read {len(cuts)} × "
                f"{tuple(cuts[0].left.shape)} of them last, and the batch has {tokens} image tokens. ImageRank works without"
            )
        stay = ~texts
        stay[texts] = torch.cat([cut.left.flatten() for cut in cuts]).to(image.device)
        return stay.repeat_interleave(beams, dim=0)


def flow(call: AttentionCall, left: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    """``I_a`` and S of a call of the encoder, (images, patches) each, and 0 where ``left`` (images, patches) is not."""
    wide = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (tensor.detach().to(wide) for tensor in (call.query, call.key, call.value))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if class_token:
        among = pad(left, (1, 0), value=True)
        asks, carries = query[:, :, 0], value[:, :, 0]
    else:
        among = left
        weight = (left / left.sum(dim=1, keepdim=True)).to(wide)[:, None, :, None]
        asks, carries = (query * weight).sum(dim=2), (value * weight).sum(dim=2)
    attention, likeness = _shares(asks * call.factor, key, among), _shares(carries, value, among)
    size = value.mean(dim=1).abs().sum(dim=-1)
    if class_token:
        attention, likeness, size = attention[:, 1:], likeness[:, 1:], size[:, 1:]
    attention, likeness = (shares / shares.sum(dim=1, keepdim=True) for shares in (attention, likeness))
    return attention, (attention + likeness) * size


def _shares(one: Tensor, tokens: Tensor, among: Tensor) -> Tensor:
    """(images, N): the mean over heads of the softmax of ``one · token``, (images, heads, D) and (images, heads, N, D)."""
    products = (tokens @ one[..., None])[..., 0].masked_fill(~among[:, None], -math.inf)
    return products.softmax(dim=-1).mean(dim=1)


def _all_visible(mask: Tensor) -> bool:
    return bool((mask if mask.dtype == torch.bool else mask == 0).all())


def _encoder_of(model: Module) -> tuple[str, Module]:
    """The path of a model's vision encoder, and itself."""
    named: dict[str, Module] = dict(model.named_modules())
    path = next((path for path in named if path.rpartition(".")[2] in _ENCODERS), None)
    if path is None:
        raise ValueError(
            f"FlowCut goes by a model's vision encoder, and {type(model).__name__} has none that is named "
            f"{', '.join(_ENCODERS)}. ImageRank works without"
        )
    if hasattr(getattr(model, "config", None), "image_grid_pinpoints"):
        raise ValueError(
            f"FlowCut cannot tell which patches the image tokens of {type(model).__name__} are: it cuts images into tiles, "
            "and adds and drops tokens where it puts them together. ImageRank works without"
        )
    return path, named[path]


def _layers_of(encoder: Module) -> tuple[str, int]:
    """The path of an encoder's stack of layers, and how many it has."""
    stacks = {name: len(module) for name, module in encoder.named_modules() if isinstance(module, ModuleList)}
    if not stacks:
        raise ValueError(
            f"FlowCut goes by the layers of a vision encoder, and {type(encoder).__name__} has no ModuleList"
        )
    stack = max(stacks, key=lambda name: stacks[name])
    return stack, stacks[stack]


def _used(model: Module, layers: int) -> int:
    """How many of the encoder's layers the image tokens come out of."""
    feature = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if feature is None:
        return layers
    numbers = [feature] if isinstance(feature, int) else list(feature)
    return max(number if number >= 0 else layers + 1 + number for number in numbers)
