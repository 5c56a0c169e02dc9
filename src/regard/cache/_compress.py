"""Compressing a model's key–value cache while it generates as it always does."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import Module

from regard.cache.kept_call import KeptCall
from regard.cache.open_block import OpenBlock
from regard.cache.policy import Policy
from regard.cache.report import Report, report
from regard.runtime import AttentionCall, HiddenCall, Proceed, Reading, Site, Stack, entered, explain, interceptors

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer


class compress:  # noqa: N801 - a context manager, named as what one writes
    """Have a policy drop entries of a language model's key–value cache, in plain ``generate``.

    Greedy, sampling, beam search and assisted generation, padded batches and several turns on one cache work as they always
    do. Positions go on counting although entries are gone. Layers with a sliding window hold no more than it and are left
    alone. It composes with `regard.watch` and `regard.steer`, which see the whole text with the dropped entries hidden.

    After the block the cache is read as it is: ``model.generate(…, past_key_values=copy.deepcopy(past))`` attends to what is
    left of it, and drops nothing more. Assisted generation drops after each pass, once it is known which tokens stay.

    Args:
        model: a decoder of transformers whose attention goes through ``scaled_dot_product_attention``.
        policy: such as ``regard.cache.SnapKV(budget=1024)``.

    Raises:
        ValueError: a cache that is quantised, static, offloaded or an encoder–decoder's; a budget that is too small.
        RuntimeError: a model whose attention is not seen; one that is being compressed already.

    Example:
        >>> import regard
        >>> model, tokenizer = regard.mini()
        >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is", return_tensors="pt")
        >>> with regard.compress(model, regard.cache.StreamingLLM(budget=0.5, sinks=2)) as cache:
        ...     written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        >>> cache.report().kept
        0.5
    """

    def __init__(self, model: Module, policy: Policy) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"compress needs a model of transformers, got {type(model).__name__}")
        if not isinstance(policy, Policy):
            hint = "(…)" if isinstance(policy, type) else ""
            raise TypeError(f"compress needs a policy such as regard.cache.SnapKV(budget=0.25), got {policy!r}{hint}")
        self.model = model
        self.policy = policy
        self._cache: Any = None  # the last one
        self._memories: WeakKeyDictionary[object, dict[Any, Any]] = WeakKeyDictionary()
        self._beside: Any = None
        self._ids: WeakKeyDictionary[object, KeptLayer] = WeakKeyDictionary()
        self._exit = ExitStack()

    edits = outermost = True

    def __repr__(self) -> str:
        return f"compress({type(self.model).__name__}, {self.policy})"

    def __enter__(self) -> compress:
        name = type(self.model).__name__
        for other in interceptors():
            if isinstance(other, compress) and _overlap(self.model, other.model):
                raise RuntimeError(
                    f"{name} is being compressed already, by a block on {type(other.model).__name__}; leave that block first"
                )
        with ExitStack() as entering:
            self._beside = entering.enter_context(self.policy.beside(self.model))
            self._block = OpenBlock()
            entering.callback(setattr, self._block, "is_open", False)
            self._entered = entering.enter_context(entered(self, self.model))
            entering.push(self._settle_unless_failed)
            self._exit = entering.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)
        if kind is None and self._cache is None:
            raise RuntimeError(_explain_no_cache(self.model, bool(self._entered.seen)))
        if kind is None:
            self._entered.check()

    def _settle_unless_failed(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """First of all that is done when the block is left."""
        if kind is None:
            self._settle()

    def report(self) -> Report:
        """What is kept in the last cache, by layer and head."""
        if self._cache is None:
            raise RuntimeError("there is nothing to report: the model has not been run inside the block")
        self._settle()
        return report(self._cache, str(self.policy), self.policy.rest.frees)

    def _settle(self) -> None:
        """Drop what was not to be dropped before it was known which tokens of the last pass stay."""
        for layer in getattr(self._cache, "layers", ()):
            if hasattr(layer, "settle"):
                layer.settle()

    # --- the model's calls --------------------------------------------------------------------------------------------

    def wants(self, site: Site) -> bool:
        """Every call; whether it has a cache is told by the call."""
        return True

    def keeps(self, stack: Stack) -> bool:
        """Whether what runs there is of the model."""
        return self._entered.tracker.frames(stack) is not None

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The output over what the policy left of the call's keys, and then its choice of what stays."""
        cache, number = call.place.cache, call.place.cache_layer
        if isinstance(call, HiddenCall) or cache is None or number is None:
            return proceed(call)
        if call.is_stored:
            raise RuntimeError(
                f"{call.place.path} computes its softmax itself, over all keys that its cache returns: entries of it cannot "
                "be dropped. compress works with attention that goes through scaled_dot_product_attention, or through "
                f"transformers' eager attention{_advice(self.model)}"
            )
        kept = self._kept(cache, number, call)
        if kept is None:
            return proceed(call)
        reading = (Reading(kept.ask),) if kept.observed or (kept.queries_to_keep and not alone) else ()
        if kept.is_whole:
            output = proceed(replace(call, readings=(*call.readings, *reading)))
        elif alone and not call.readings:
            output = kept.attend()
        else:
            output = proceed(replace(kept.restore(), readings=(*call.readings, *reading)))
        self._drop(kept)
        return output

    def _kept(self, cache: Any, number: int, call: AttentionCall) -> KeptCall | None:
        """The call on what is left of the layer whose keys it attends to; None where nothing of it can be dropped."""
        from regard.cache.adopt import adopt, has_own_keys, lender

        self._cache = cache
        if not has_own_keys(cache, number):
            layer = lender(cache, call)
            return None if layer is None else KeptCall(None, layer, call, call.query.shape[2])
        layer = adopt(cache, number, self.model, self._block, call)
        if layer is None:
            return None
        if not layer.new:
            raise RuntimeError(
                f"{call.place.path} makes several calls of attention on one layer of its cache; compress knows one for each"
            )
        return self._own(layer, call)

    def _own(self, layer: KeptLayer, call: AttentionCall) -> KeptCall:
        tokens, layer.new = layer.new, 0
        if layer.rank == 0:
            layer.take_ids(call.place.token_ids, tokens)
            self._ids[call.place.cache] = layer
        kind = KeptCall if tokens > 1 else self.policy.step_call(layer)
        due = not layer.recording and self._is_due(layer, tokens)
        return kind(self.policy, layer, call, tokens, due)

    def _is_due(self, layer: KeptLayer, tokens: int) -> bool:
        """Whether to compress after these tokens: a prompt or a turn, a step, or several that were verified at once."""
        if (tokens > 1 and not layer.verifies) or layer.seen <= 1:
            layer.steps = 0
            return self.policy.when.due(tokens, 0)
        layer.steps += tokens
        return any(self.policy.when.due(1, step) for step in range(layer.steps - tokens + 1, layer.steps + 1))

    def _drop(self, kept: KeptCall) -> None:
        """After a call: let the policy choose what stays, if it is time to."""
        layer = kept.layer
        kept.note_queries()
        if layer.recording:
            layer.pending = functools.partial(self._drop_of_pass, kept, kept.real)
        elif kept.due:
            self._drop_now(kept, kept.real)

    def _drop_of_pass(self, kept: KeptCall, real: Tensor | None) -> None:
        """Once it is known which tokens of a pass stay."""
        layer = kept.layer
        due = kept.left > 0 and self._is_due(layer, kept.left)
        layer.verifies = True
        if due:
            self._drop_now(kept, None if real is None else real[:, : layer.seen])

    def _drop_now(self, kept: KeptCall, real: Tensor | None) -> None:
        cache = kept.call.place.cache
        first = self._ids.get(cache)
        ids = None if first is None else first.token_ids
        kept.drop(real, memory=self._memories.setdefault(cache, {}), token_ids=ids, beside=self._beside)


def _overlap(one: Module, other: Module) -> bool:
    """Whether one of them is the other, or a part of it."""
    return any(module is one for module in other.modules()) or any(module is other for module in one.modules())


def _advice(model: Module) -> str:
    return ': call model.set_attn_implementation("sdpa") first' if getattr(model, "_supports_sdpa", False) else ""


def _explain_no_cache(model: Module, seen: bool) -> str:
    """Why a block has compressed nothing."""
    name = type(model).__name__
    if not seen:
        return f"nothing was compressed: {explain(model)}"
    return (
        f"nothing was compressed: {name} kept no keys and values. It needs to be a decoder that takes past_key_values, run "
        "with use_cache=True, and without gradient checkpointing, which turns it off"
    )
