"""Where in a model and in a text each attention call stands."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from regard.calls.cache import CacheWatch
from regard.calls.call import AttentionCall, normalize
from regard.calls.enter import enter_all
from regard.calls.modules import ModuleStack
from regard.calls.text import Text

_SEEN = "torch.nn.functional.scaled_dot_product_attention or nn.MultiheadAttention"


class Tracker:
    """Follows a model while it runs, or with None every module: names its attention calls and places them in their texts.

    A compiled model runs uncompiled meanwhile. ``layers`` are the paths of the calls seen, in the order of their numbers.
    """

    def __init__(self, model: Module | None) -> None:
        self.layers: list[str] = []
        self._numbers: dict[str, int] = {}
        self._model = model
        self._cache = CacheWatch()
        self._modules = ModuleStack(model, self._cache.begin)
        self._texts: dict[str, Text] = {}
        self._texts_by_cache: WeakKeyDictionary[object, dict[str, Text]] = WeakKeyDictionary()
        self._memo: dict[object, Any] = {}
        self._pass = -1
        self._exit = ExitStack()

    def __enter__(self) -> Tracker:
        compiled = self._model is None or _is_compiled(self._model)
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        self._exit = enter_all(stance, self._modules, self._cache)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def name(self, call: AttentionCall) -> AttentionCall | None:
        """The call in its normal form, with its path, layer and pass; None if the model did not make it."""
        if not self._modules.active:
            return None
        path = self._modules.next_label()
        if path not in self._numbers:
            self._numbers[path] = len(self._numbers)
            self.layers.append(path)
        normal = normalize(call, self._modules.module)
        return normal.changed(path=path, layer=self._numbers[path], pass_index=self._modules.pass_index)

    def pass_by(self) -> None:
        """Leave out a layer that is none of those looked for, but counts among them."""
        if self._modules.active:
            self._numbers.setdefault(self._modules.next_label(), len(self._numbers))

    def place(self, call: AttentionCall) -> tuple[AttentionCall, Text]:
        """The named call with its positions and token ids, and the text that it goes on with or begins."""
        texts = self._texts_of_cache()
        text = texts.get(call.path) or self._texts.get(call.path) or Text()
        past = self._cache.past if call.past is None else call.past
        continues, query_start, key_start = text.place(call, past)
        if not continues:
            text = Text()
        texts[call.path] = text
        if call.pass_index != self._pass:  # within a pass, most layers ask for the same sets of positions
            self._memo, self._pass = {}, call.pass_index
        text.extend(call, query_start, self._longer_ids(text.token_ids, call))
        placed = call.changed(
            query_start=query_start, key_start=key_start, token_ids=text.token_ids, memo=self._memo
        )  # fmt: skip
        return placed, text

    def _longer_ids(self, before: Tensor | None, call: AttentionCall) -> Tensor | None:
        """The ids of the text so far and of the call's tokens; the layers of a pass that share the text share the tensor."""
        key = ("ids", id(before), call.query.shape[2], "decoder" in call.path)
        if key not in self._memo:
            own = self._token_ids(call)
            known = self._cache.reordered(before)
            self._memo[key] = (own if own is None or known is None else torch.cat([known, own], dim=1), before)
        longer: Tensor | None = self._memo[key][0]
        return longer

    def _texts_of_cache(self) -> dict[str, Text]:
        """The texts that go on with the pass's cache, by path: generations may take turns, each with a cache of its own."""
        cache = self._cache.current
        return self._texts if cache is None else self._texts_by_cache.setdefault(cache, {})

    def check(self) -> None:
        """Refuse a block in which no call was made, with what to do about it."""
        if not self.layers:
            raise RuntimeError(_explain_no_call(self._model, ran=self._modules.pass_index >= 0))

    def _token_ids(self, call: AttentionCall) -> Tensor | None:
        """The ids of the call's own tokens among the model's arguments; an empty tensor if there are ids, but of others."""
        names = ("decoder_input_ids", "input_ids") if "decoder" in call.path else ("input_ids", "decoder_input_ids")
        given: list[Any] = [self._modules.arguments.get(name) for name in names] + list(self._modules.positional)
        ids = [g for g in given if isinstance(g, Tensor) and g.ndim == 2 and g.dtype in (torch.int64, torch.int32)]
        own = [i for i in ids if i.shape[1] == call.query.shape[2]]
        return own[0] if own else (ids[0][:, :0] if ids else None)


def _is_compiled(model: Module) -> bool:
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())


def _explain_no_call(model: Module | None, ran: bool) -> str:
    if model is None:
        return f"no attention call was seen in the block: nothing in it called {_SEEN}"
    name = type(model).__name__
    if not ran:
        return f"no attention call was seen: {name} was not run inside the block"
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        return (
            f"no attention call was seen: {name} runs attn_implementation={implementation!r}, which does not call {_SEEN}. "
            'Before the block, call: model.set_attn_implementation("sdpa")'
        )
    return (
        f"no attention call was seen in {name}: its attention is its own code, not {_SEEN}. "
        "Compute it there, or build regard.AttentionMap from its queries and keys; a mixer is seen where it has a map()"
    )
