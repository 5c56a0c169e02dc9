"""Watching a model's attention while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import AttentionMap, TokenMap
from regard.runtime import AttentionCall, Call, Entry, HiddenCall, Place, Proceed, Reading, Reentrant, Site
from regard.tokens import Heads, Layers, Passes, Selection, check
from regard.watch._sequence import Part, Sequence
from regard.watch.recording import Recording
from regard.watch.statistic import Statistic

_Answered = TypeVar("_Answered")


class watch(Reentrant["_Entry"]):  # noqa: N801 - a context manager, named as what one writes
    """Read statistics from every attention call of a model, while it runs as it always does.

    The model is not changed, and everything is restored on exit. Blocks may be nested, and several models may run in
    them. ``generate`` is one text: its prompt and its steps are joined on one axis of queries. Gradient checkpointing,
    autocast and inference mode work; a compiled model runs uncompiled inside the block.

    Args:
        model: an ``nn.Module`` whose attention goes through ``scaled_dot_product_attention``, ``nn.MultiheadAttention``,
            transformers' eager attention, or a softmax of its own that enters a product with values; left out or None,
            every call made in the block. Of ``regard.mixers``, those that have a hidden map are read by it, each as one call.
        statistics: what to read, such as ``regard.Entropy()``.
        layers: the number of an attention call in order, negative from the last, a slice or range of them, a glob on the path
            of the module that makes it, or several of these.
        heads: numbers of query heads in the same way, or a mapping from layers to heads.
        passes: numbers of the model's passes in the block: of ``generate`` 0 is the prompt, in diffusion they are steps.
        token_mask: (batch, tokens), nonzero for real tokens, as a tokenizer's ``attention_mask``. Padded queries become
            NaN and count in no sum. Tokens that ``generate`` adds are real.
        tokenizer: of a model of transformers; what is recorded is labelled with its tokens.
        keep_maps: keep each call's `AttentionMap` (and with it copies of its query and key) in ``seen.maps``.
        share: let the statistics of a float32 model ride in the model's own attention call, which is faster and changes
            its output by rounding (about 1e-6); False leaves each bit as it was. In half precision, or where gradients
            are wanted, it is left as it was in any case; so it is on the fast path of PyTorch's own transformer layers in
            evaluation, where projection and attention are computed once more to be read.

    Raises:
        RuntimeError: at the end of a block in which no attention call was seen, naming what was found.
        IndexError, ValueError: layers or heads that do not exist, statistics of the same name, NaN in queries or keys, a
            mixer that goes on from a state, where its map does not tell of the tokens before.
        NotImplementedError: for `Entropy` and `Sinks` of a mixer by its hidden map, whose rows are no probabilities.

    Example:
        >>> import torch, regard
        >>> encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> with torch.no_grad(), regard.watch(encoder, regard.Entropy(), regard.Received()) as seen:
        ...     _ = encoder(torch.randn(1, 10, 32))
        >>> seen.dataset().entropy.dims
        ('layer', 'batch', 'head', 'query')

        A mixer without softmax, by its hidden map:

        >>> from regard.mixers.linear import DeltaRule
        >>> mixer = DeltaRule(32, heads=4)
        >>> with torch.no_grad(), regard.watch(mixer, regard.Received(), regard.TopK(3)) as seen:
        ...     y, state = mixer(torch.randn(1, 10, 32))
        >>> seen.dataset().received.shape
        (1, 1, 4, 10)
    """

    def __init__(
        self,
        model: Module | Statistic | None = None,
        *statistics: Statistic,
        layers: Layers | None = None,
        heads: Heads | Mapping[Any, Heads] | None = None,
        passes: Passes | None = None,
        token_mask: Tensor | None = None,
        tokenizer: Any = None,
        keep_maps: bool = False,
        share: bool = True,
    ) -> None:
        if isinstance(model, Statistic):
            statistics, watched = (model, *statistics), None
        else:
            watched = model
        super().__init__()
        _check(watched, statistics, keep_maps)
        self.model = watched
        self.statistics = statistics
        self.token_mask = None if token_mask is None else _check_mask(token_mask)
        self.tokenizer = tokenizer
        self.keep_maps = keep_maps
        self.share = share
        self._selection = Selection(layers, heads, passes)

    def __repr__(self) -> str:
        model = [] if self.model is None else [type(self.model).__name__]
        return f"watch({', '.join([*model, *map(repr, self.statistics)])})"

    def __enter__(self) -> Recording:
        return self._enter(_Entry(self, self._selection), self.model).recording


class _Entry(Entry):
    """One entry into a watch: has the calls of the model read, and puts together what is measured."""

    def __init__(self, options: watch, selection: Selection) -> None:
        self.recording = Recording(options.statistics, options.tokenizer)
        self._options = options
        self._selection = selection
        self._tokens = 0  # of the longest text seen

    def check(self) -> None:
        """Refuse a block in which there was nothing to see, or not what was chosen."""
        super().check()
        self._selection.check(self.block.seen, passes=self.block.passes)
        for statistic in self._options.statistics:
            for name, where in statistic.named_positions().items():
                check(where, self._tokens, name)

    def wants(self, site: Site) -> bool:
        """Whether its layer was chosen."""
        return self.block.chooses(self._selection, site)

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """Have what is run in the end be read."""
        place, mask = call.place, self._mask_of(call)
        if mask is not place.token_mask:
            place = replace(place, token_mask=mask)
        share = self._options.share and self._selection.every_head
        return proceed(call.with_reading(Reading(partial(self._ask, place), share)))

    def _ask(self, place: Place, attention: TokenMap, last: AttentionCall | HiddenCall) -> Callable[[], None]:
        """Have each statistic announce what it needs; what is returned measures them."""
        call: Call = last.at(place)
        heads = None
        if not self._selection.every_head:
            layers = self.block.layers(self._selection)
            heads = self._selection.heads(place.path, place.layer, attention.shape[1], layers)
        if heads is not None:
            attention, call = attention.heads(heads), call.heads(heads)
        asked = [
            (statistic, _answer(statistic, place, statistic.ask, attention, call))
            for statistic in self._options.statistics
        ]

        def take() -> None:
            measured: dict[str, Tensor] = {}
            for statistic, answer in asked:
                result = _answer(statistic, place, answer)
                named = {statistic.name: result} if isinstance(result, Tensor) else result
                for name, dims in statistic.dimensions().items():
                    measured[name] = _masked(named[name], dims, place.token_mask).cpu()
            self._record(place, attention, heads, measured)

        return take

    def _record(
        self, place: Place, attention: TokenMap, heads: list[int] | None, measured: Mapping[str, Tensor]
    ) -> None:
        recording, text = self.recording, self.block.tracker.text_of(place)
        if text.token_ids is not None and text.token_ids.shape[1] == text.end:
            recording.token_ids = text.token_ids
        if place.path not in recording.layers:
            recording.layers.append(place.path)
        sequences = recording._sequences.setdefault(place.path, [])
        if not sequences or sequences[-1].text is not text:
            sequences.append(Sequence(text, place.pass_index))
        _, number, queries, keys = attention.shape
        self._tokens = max(self._tokens, place.query_start + queries, place.key_start + keys)
        every = list(range(number)) if heads is None else heads
        sequences[-1].parts.append(Part(place.query_start, place.key_start, queries, keys, every, measured))
        if self._options.keep_maps:
            # A model may write over its tensors later, as those do that keep a cache of fixed size.
            kept = copy.deepcopy(attention) if isinstance(attention, AttentionMap) else attention
            recording.maps.setdefault(place.path, []).append(kept)

    def _mask_of(self, call: AttentionCall | HiddenCall) -> Tensor | None:
        mask, real = self._options.token_mask, call.place.token_mask
        if mask is None:
            return real
        place, batch = call.place, call.value.shape[0]
        queries = call.queries if isinstance(call, HiddenCall) else call.query.shape[2]
        end = place.query_start + queries
        if batch % mask.shape[0] or (place.query_start == 0 and queries != mask.shape[1]):
            raise ValueError(
                f"token_mask has shape {tuple(mask.shape)}, but {place.path} has a batch of {batch} with {queries} queries; "
                "watch only the layers that it belongs to, with layers="
            )
        mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)  # the beams of one text follow one another
        mask = torch.nn.functional.pad(mask, (0, max(end - mask.shape[1], 0)), value=True)[:, place.query_start : end]
        return mask if real is None else mask.to(real.device) & real


def _masked(values: Tensor, dims: tuple[str, ...], mask: Tensor | None) -> Tensor:
    """NaN for padded queries."""
    if mask is None or "query" not in dims:
        return values
    shape = [1] * values.ndim
    shape[0], shape[2 + dims.index("query")] = mask.shape
    return values.masked_fill(~mask.to(values.device).view(shape), torch.nan)


def _answer(statistic: Statistic, place: Place, ask: Callable[..., _Answered], *arguments: object) -> _Answered:
    """What is answered; where a map has no answer to what a statistic asks, say so."""
    try:
        return ask(*arguments)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(statistic).__name__} of {place.path}: {error}; leave out the statistic, or the layer with layers="
        ) from error


def _check(model: object, statistics: tuple[Statistic, ...], keep_maps: bool) -> None:
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"watch needs an nn.Module, or None for every call in the block; got {type(model).__name__}")
    for statistic in statistics:
        if not isinstance(statistic, Statistic):
            hint = "(…)" if isinstance(statistic, type) else ""
            raise TypeError(f"watch takes statistics such as regard.Entropy(), got {statistic!r}{hint}")
    if not statistics and not keep_maps:
        raise ValueError("watch has nothing to read: pass statistics such as regard.Entropy(), or keep_maps=True")
    names = [name for statistic in statistics for name in statistic.dimensions()]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two statistics are named {', '.join(sorted(twice))}; give one another name=")
    dims = {"pass", "layer", "batch", "head"}.union(*(d for s in statistics for d in s.dimensions().values()))
    taken = sorted(set(names) & (dims | {f"{dim}_token" for dim in ("query", "key")}))
    if taken:
        raise ValueError(
            f"{taken[0]!r} is a dimension of the dataset, and no name for a statistic; give it another name="
        )


def _check_mask(token_mask: Tensor) -> Tensor:
    if token_mask.ndim != 2:
        raise ValueError(f"token_mask must be (batch, tokens), got shape {tuple(token_mask.shape)}")
    return token_mask.bool()
