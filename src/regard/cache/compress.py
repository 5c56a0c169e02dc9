"""Compressing a model's key–value cache while it generates as it always does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.kept_call import KeptCall
from regard.cache.policy import Policy
from regard.cache.report import Report, report
from regard.cache.restricted_call import RestrictedCall
from regard.calls import AttentionCall, enter_all, keep
from regard.calls.call import unpacked

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer

_compressed: WeakSet[Module] = WeakSet()


class compress:  # noqa: N801 - a context manager, named as what one writes
    """Have a policy drop entries of a language model's key–value cache, in plain ``generate``.

    Greedy, sampling and beam search, left-padded batches and several turns on one cache work as they always do. Positions
    go on counting although entries are gone. Layers with a sliding window hold no more than it and are left alone. It
    composes with `regard.watch` and `regard.steer`, which see the whole text with the dropped entries hidden.

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
        self._adopted: list[KeptLayer] = []
        self._memory: dict[Any, Any] = {}
        self._beside: Any = None
        self._ids: Tensor | None = None  # of the pass's tokens
        self._first: KeptLayer | None = None
        self._pending: tuple[KeptLayer, int] | None = None
        self._passes = 0
        self._thread = 0
        self._exit = ExitStack()

    def __enter__(self) -> compress:
        if self.model in _compressed:
            raise RuntimeError(f"{type(self.model).__name__} is being compressed already; leave that block first")
        self._thread = threading.get_ident()
        self._exit = enter_all(
            self._enter_beside(),
            keep(self),
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
        )
        _compressed.add(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _compressed.discard(self.model)
        self._exit.close()
        self._pending = None
        for layer in self._adopted:
            layer.keeper, layer.state = None, {}
        if kind is None and not self._adopted:
            raise RuntimeError(_explain_no_cache(self.model, self._passes))

    @contextmanager
    def _enter_beside(self) -> Iterator[None]:
        with self.policy.beside(self.model) as self._beside:
            yield

    def report(self) -> Report:
        """What is kept in the last cache, by layer and head."""
        if self._cache is None:
            raise RuntimeError("there is nothing to report: the model has not been run inside the block")
        return report(self._cache, str(self.policy), self.policy.frees)

    # --- the model's passes -------------------------------------------------------------------------------------------

    def _begin(
        self, model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a pass: put layers that can drop entries into its cache."""
        if threading.get_ident() != self._thread:
            return None
        self._passes += 1
        self._ids = _token_ids(args, kwargs)
        given = kwargs.get("past_key_values")
        config: Any = getattr(model, "config", None)
        if given is None and kwargs.get("use_cache") is not False and config is not None:
            from transformers import DynamicCache

            given = DynamicCache(config=config)
            kwargs = kwargs | {"past_key_values": given}
        if given is not None:
            self._adopt(given)
        return args, kwargs

    def _end(self, model: Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread:
            self._refuse_pending()

    def _adopt(self, cache: Any) -> None:
        from regard.cache.adopt import adopt

        if cache is not self._cache:
            self._memory = {}
        self._cache = cache
        self._adopted = adopt(cache, self)

    def expect(self, layer: KeptLayer, tokens: int) -> None:
        """The attention call that follows is this layer's, with so many new tokens."""
        self._refuse_pending()
        self._pending = (layer, tokens)
        if layer.rank == 0:
            self._first = layer
            layer.take_ids(self._ids, tokens)

    def _refuse_pending(self) -> None:
        if self._pending is not None:
            name = type(self.model).__name__
            raise RuntimeError(
                f"{name} filled its cache, but its attention was not seen: it does not call "
                'torch.nn.functional.scaled_dot_product_attention. Call model.set_attn_implementation("sdpa") first'
            )

    def find(self, call: AttentionCall) -> KeptCall | None:
        """The call that follows an update of a layer that is kept here."""
        if self._pending is None or threading.get_ident() != self._thread:
            return None
        (layer, tokens), self._pending = self._pending, None
        local = self.policy.local
        kind = KeptCall if local is None or tokens > 1 or layer.seen <= sum(local) else RestrictedCall
        kept = kind(self, layer, call if call.query.shape[2] == tokens else unpacked(call), tokens)
        if not kept.observed and not kept.dropped:  # the call has all it needs
            self.drop(kept)
        return kept

    def drop(self, kept: KeptCall) -> None:
        """After a call: let the policy choose what stays, if it is time to."""
        layer, policy = kept.layer, self.policy
        layer.steps = layer.steps + 1 if kept.tokens == 1 and layer.seen > 1 else 0
        if not policy.due(kept.tokens, layer.steps):
            return
        ids = None if self._first is None else self._first.token_ids
        entries = layer.entries(kept.real, self._memory, new=kept.tokens, token_ids=ids, beside=self._beside)
        scores = policy.score(entries).masked_fill(~entries.real, -torch.inf)
        counts = policy.counts(entries, scores).minimum(entries.real.sum(dim=-1))
        layer.keep(scores, counts, policy.pools)
        if not policy.accumulates:
            layer.forget()


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The ids (B, n) of a pass's tokens, where the model is given any."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None


def _explain_no_cache(model: Module, passes: int) -> str:
    name = type(model).__name__
    if not passes:
        return f"nothing was compressed: {name} was not run inside the block"
    return (
        f"nothing was compressed: {name} kept no keys and values. It needs to be a decoder that takes past_key_values, "
        "run with use_cache=True"
    )
