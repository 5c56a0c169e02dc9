"""Where in a model and in a text each attention call stands."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import beams
from regard.runtime.call import AttentionCall, Place
from regard.runtime.stack import Frame, Stack
from regard.runtime.text import Text

_BARE = "scaled_dot_product_attention"


@dataclass
class _Pass:
    """One run of the model from entry to exit: a call of it, one step of ``generate``."""

    run: object
    index: int
    root: Frame | None
    calls: dict[str, int] = field(default_factory=dict)  # how many each path has made
    memo: dict[object, Any] = field(default_factory=dict)


class Site(NamedTuple):
    """Which call of a model this is; where in its text it stands is found only for who wants to know."""

    path: str
    layer: int
    pass_index: int
    frames: list[Frame]
    running: _Pass

    @property
    def maker(self) -> tuple[Module | None, int | None]:
        """The module that made the call, and how many tokens it was given, where that can be told."""
        if not self.frames:
            return None, None
        frame = self.frames[0]
        given = _given(frame)
        return frame.module, None if given is None or given.ndim != 3 else given.shape[1]

    @property
    def token_ids(self) -> Tensor | None:
        """The ids that this pass of the model was given, (batch, tokens), if any."""
        ids = _ids_given(self)
        return ids[0] if ids else None

    @property
    def cache(self) -> tuple[Any, int | None]:
        """The key–value cache that the call's layer was given, and the layer's number in it; None where there is none."""
        return _cache_of(self.frames)


def is_over_channels(call: AttentionCall, frame: Frame) -> bool:
    """Whether queries and keys are the channels of what the call's module was given, and its tokens the values' width.

    So it is in cross-covariance and channel attention: El-Nouby et al., "XCiT" (2021), Ding et al., "DaViT" (2022).
    """
    given = _given(frame)
    if given is None or call.query.ndim != 4:
        return False
    channels, tokens = given.shape[-1], given.shape[-2]
    if given.ndim == 4:  # an image, (B, C, H, W)
        channels, tokens = given.shape[1], given.shape[2] * given.shape[3]
    heads, queries = call.query.shape[1:3]
    if call.value.shape[3] != tokens or queries == tokens:
        return False
    return queries == call.key.shape[2] and heads * queries == channels


def _given(frame: Frame) -> Tensor | None:
    """What a module was given to attend from: (B, tokens, channels), or (B, C, H, W)."""
    hidden = frame.arguments.get("hidden_states")
    if hidden is None and frame.positional:
        hidden = frame.positional[0]
    if not isinstance(hidden, Tensor) or hidden.is_nested:
        return None
    return hidden if hidden.ndim in (3, 4) else None


class Tracker:
    """Names the calls of a model, or with None those of every module, and places them in their texts.

    All blocks that are open on a model share one. ``layers`` are the paths of the calls seen, in the order of their numbers.
    """

    def __init__(self, model: Module | None) -> None:
        self.model = model
        self.layers: list[str] = []
        self.passes = 0
        self._numbers: dict[str, int] = {}
        self._names: dict[Module, dict[Module, str]] = {}
        self._strangers: WeakKeyDictionary[Module, WeakSet[Module]] = WeakKeyDictionary()
        self._of_parts: set[str] = set()  # paths of what parts of the model did by themselves since its last pass
        self._running: dict[int, _Pass] = {}  # by thread: several may run the model at once
        self._texts: dict[str, Text] = {}
        self._texts_by_cache: WeakKeyDictionary[object, dict[str, Text]] = WeakKeyDictionary()
        self._orders: WeakKeyDictionary[object, int] = WeakKeyDictionary()  # the last that was followed

    def find(self, stack: Stack, label: str = "") -> Site | None:
        """Count a call that is made now; None if the model did not make it. ``label`` is added to its module's path."""
        frames = self.frames(stack)
        if frames is None:
            return None
        running = self._pass_of(frames)
        path = self._path(frames) + label
        if self.model is not None and frames[-1].module is not self.model:
            self._count_part(running, path)
        number = running.calls.get(path, 0)
        running.calls[path] = number + 1
        path = f"{path}#{number}" if number else path
        if path not in self._numbers:
            self._numbers[path] = len(self._numbers)
            self.layers.append(path)
        return Site(path, self._numbers[path], running.index, frames, running)

    def frames(self, stack: Stack) -> list[Frame] | None:
        """What runs of the model, the innermost first; None if nothing does.

        Its outermost may be a part of it that runs by itself, as a tower that ``generate`` asks.
        """
        if self.model is None:
            return stack.direct
        found = stack.above(self.model)
        if found is not None or not stack.direct:
            return found
        parts = self._names_in(self.model, [frame.module for frame in stack.direct])
        inside = [number for number, frame in enumerate(stack.direct) if frame.module in parts]
        return stack.direct[: inside[-1] + 1] if inside else None

    def place(self, site: Site, value: Tensor, queries: int, past: int | None = None) -> Place:
        """The call's positions and token ids in the text that it goes on with or begins.

        ``value`` is the call's, ``past`` the number of tokens before it, where its maker says.
        """
        cache, cache_layer = site.cache
        texts = self._texts if cache is None else self._texts_by_cache.setdefault(cache, {})
        text = texts.get(site.path) or self._texts.get(site.path) or Text()
        if past is None:
            past = _tokens_before(cache, cache_layer, queries)
        continues, query_start, key_start = text.place(value, queries, past)
        if not continues:
            text = Text(_cut(text.token_ids, past, value.shape[0]))
        texts[site.path] = text
        text.extend(value, queries, query_start, self._longer_ids(site, text.token_ids, queries, cache))
        return Place(
            site.path, site.layer, site.pass_index, query_start, key_start, text.token_ids, None, cache, cache_layer,
            site.running.memo,
        )  # fmt: skip

    def text_of(self, place: Place) -> Text:
        """The text that a call placed here goes on with."""
        texts = self._texts if place.cache is None else self._texts_by_cache[place.cache]
        return texts[place.path]

    def count_layers(self) -> int | None:
        """How many calls a pass makes: of one that is over, or as many as the model has innermost modules of attention."""
        if self.passes > 1 and self.layers:
            return len(self.layers)
        if self.model is None:
            return None
        return _attention_modules(self.model)

    def _pass_of(self, frames: list[Frame]) -> _Pass:
        thread = threading.get_ident()
        running = self._running.get(thread)
        root = frames[-1] if frames else None
        run = None if root is None else root.run
        if running is None or running.run is not run:
            running = self._running[thread] = _Pass(run, self.passes, root)
            if self.model is None or (root is not None and root.module is self.model):
                self.passes += 1
                self._of_parts.clear()
        return running

    def _count_part(self, running: _Pass, path: str) -> None:
        """What a part of the model does by itself belongs to the pass to come; but where it runs twice, to one of its own."""
        if path in self._of_parts and path not in running.calls:
            self.passes += 1
            running.index = self.passes
            self._of_parts.clear()
        self._of_parts.add(path)

    def _path(self, frames: list[Frame]) -> str:
        if not frames:
            return _BARE
        root, module = frames[-1].module if self.model is None else self.model, frames[0].module
        name = self._names_in(root, [module]).get(module, type(module).__name__)
        if self.model is not None:
            return name or type(root).__name__
        return f"{type(root).__name__}.{name}" if name else type(root).__name__

    def _names_in(self, root: Module, modules: Iterable[Module]) -> Mapping[Module, str]:
        """The paths of a module's parts, those among ``modules`` included that were made while it runs."""
        names = self._names.setdefault(root, {})
        unknown = [module for module in modules if module not in names]
        if unknown:
            strangers = self._strangers.setdefault(root, WeakSet())
            if any(module not in strangers for module in unknown):
                names.update({inner: _without_wrappers(name) for name, inner in root.named_modules()})
                strangers.update(module for module in unknown if module not in names)
        return names

    # --- token ids ----------------------------------------------------------------------------------------------------

    def _longer_ids(self, site: Site, before: Tensor | None, queries: int, cache: Any) -> Tensor | None:
        """The ids of the text so far and of the call's tokens; the layers of a pass that share the text share the tensor."""
        memo = site.running.memo
        key = ("ids", id(before), queries, "decoder" in site.path)
        if key not in memo:
            own = _token_ids(site, queries)
            known = self._in_order(before, cache, site)
            memo[key] = (own if own is None or known is None else torch.cat([known, own], dim=1), before)
        longer: Tensor | None = memo[key][0]
        return longer

    def _in_order(self, token_ids: Tensor | None, cache: Any, site: Site) -> Tensor | None:
        """Ids of the text so far, in the order that beam search has put the batch in since the last pass."""
        if ("order", id(cache)) not in site.running.memo:
            number, order = beams.last_order(cache)
            followed = cache is None or self._orders.get(cache, 0) == number
            site.running.memo["order", id(cache)] = None if followed else order
            if not followed:
                self._orders[cache] = number
        order = site.running.memo["order", id(cache)]
        if token_ids is None or order is None or len(order) != len(token_ids):
            return token_ids
        return token_ids[order.to(token_ids.device)]


def _cut(token_ids: Tensor | None, past: int | None, batch: int) -> Tensor | None:
    """The ids of a text whose last tokens were taken back, as by a cache that is cropped to the candidates accepted."""
    if token_ids is None or not past or token_ids.shape[1] < past or token_ids.shape[0] != batch:
        return None
    return token_ids[:, :past]


def _token_ids(site: Site, queries: int) -> Tensor | None:
    """The ids of the call's own tokens among the model's arguments; an empty tensor if there are ids, but of others."""
    ids = _ids_given(site)
    own = [i for i in ids if i.shape[1] == queries]
    return own[0] if own else (ids[0][:, :0] if ids else None)


def _ids_given(site: Site) -> list[Tensor]:
    root = site.running.root
    if root is None:
        return []
    names = ("decoder_input_ids", "input_ids") if "decoder" in site.path else ("input_ids", "decoder_input_ids")
    given: list[Any] = [root.arguments.get(name) for name in names] + list(root.positional)
    return [g for g in given if isinstance(g, Tensor) and g.ndim == 2 and g.dtype in (torch.int64, torch.int32)]


def _cache_of(frames: list[Frame]) -> tuple[Any, int | None]:
    """What the innermost modules were given as their cache, as far out as the one that knows the number of its layer."""
    found: Any = None
    for frame in frames:
        if found is None:
            found = _cache_among(frame)
        number = getattr(frame.module, "layer_idx", None)
        if isinstance(number, int):
            return found, None if found is None else number
    return None, None


def _cache_among(frame: Frame) -> Any:
    given = (*frame.arguments.values(), *frame.positional)
    return next((one for one in given if not isinstance(one, Tensor) and hasattr(one, "get_seq_length")), None)


def _tokens_before(cache: Any, layer: int | None, queries: int) -> int | None:
    """How many tokens the cache held before the call's own, which it has taken by now; None if it does not tell."""
    if cache is None:
        return None
    layers = getattr(cache, "layers", ())
    own = None if layer is None or layer >= len(layers) else layers[layer]
    borrows = not hasattr(own, "get_seq_length") and any(hasattr(other, "get_seq_length") for other in layers)
    length = 0 if borrows else int(cache.get_seq_length(layer))
    if length < queries:  # a layer that attends to the keys of another has none of its own
        length = max((int(other.get_seq_length()) for other in layers if hasattr(other, "get_seq_length")), default=0)
    return length - queries if length >= queries else None


def _attention_modules(model: Module) -> int:
    names = [
        name for name, module in model.named_modules() if re.search("attention|attn|mixer", type(module).__name__, re.I)
    ]
    return sum(not any(other.startswith(f"{name}.") for other in names) for name in names)


def _without_wrappers(path: str) -> str:
    """torch.compile's wrapper is no part of the model's own paths."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
