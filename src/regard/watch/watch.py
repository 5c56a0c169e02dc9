"""Watching a model's attention while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module

from regard.calls import AttentionCall, Heads, Layers, Reading, Selection, Text, Tracker, enter_all, listen
from regard.maps import AttentionMap, TokenMap
from regard.watch._sequence import Part, Sequence
from regard.watch.recording import Recording
from regard.watch.statistic import Statistic


class watch:  # noqa: N801 - a context manager, named as what one writes
    """Read statistics from every attention call of a model, while it runs as it always does.

    The model is not changed, and everything is restored on exit. Blocks may be nested, and several models may run in
    them. ``generate`` is one text: its prompt and its steps are joined on one axis of queries. Gradient checkpointing,
    autocast and inference mode work; a compiled model runs uncompiled inside the block.

    Args:
        model: an ``nn.Module`` whose attention goes through ``scaled_dot_product_attention`` or ``nn.MultiheadAttention``,
            as transformers' does with ``attn_implementation="sdpa"``; left out or None, every call made in the block. Of
            ``regard.mixers``, those that have a hidden map are read by it, each as one call.
        statistics: what to read, such as ``regard.Entropy()``.
        layers: the number of an attention call in order, a glob on the path of the module that makes it, or several.
        heads: the number of a query head, several, or a mapping from layers to heads.
        token_mask: (batch, tokens), nonzero for real tokens, as a tokenizer's ``attention_mask``. Padded queries become
            NaN and count in no sum. Tokens that ``generate`` adds are real.
        keep_maps: keep each call's `AttentionMap` (and with it its query and key) in ``seen.maps``.
        share: let the statistics of a float32 model ride in the model's own attention call, which is faster and changes
            its output by rounding (about 1e-6); False leaves each bit as it was. In half precision, or where gradients
            are wanted, it is left as it was in any case.

    Raises:
        RuntimeError: at the end of a block in which no attention call was seen, naming the implementation used.
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
        heads: Heads | Mapping[int | str, Heads] | None = None,
        token_mask: Tensor | None = None,
        keep_maps: bool = False,
        share: bool = True,
    ) -> None:
        if isinstance(model, Statistic):
            statistics, watched = (model, *statistics), None
        else:
            watched = model
        _check(watched, statistics, keep_maps)
        self._model = watched
        self._statistics = statistics
        self._layers, self._heads = layers, heads
        self._token_mask = None if token_mask is None else _check_mask(token_mask)
        self._keep_maps = keep_maps
        self._share = share
        self._blocks: list[_Block] = []

    def __enter__(self) -> Recording:
        selection = Selection(self._layers, self._heads)
        block = _Block(self._model, self._statistics, selection, self._token_mask, self._keep_maps, self._share)
        block.enter()
        self._blocks.append(block)
        return block.recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        block = self._blocks.pop()
        block.exit()
        if kind is None:
            block.check()


class _Block:
    """One entry into a watch: listens to calls, places them in their text, and has them measured."""

    def __init__(
        self,
        model: Module | None,
        statistics: tuple[Statistic, ...],
        selection: Selection,
        token_mask: Tensor | None,
        keep_maps: bool,
        share: bool,
    ) -> None:
        self.recording = Recording(statistics)
        self.statistics = statistics
        self.share = share
        self._keep_maps = keep_maps
        self._selection = selection
        self._token_mask = token_mask
        self._tracker = Tracker(model)
        self._exit = ExitStack()

    def enter(self) -> None:
        self._exit = enter_all(self._tracker, listen(self))

    def exit(self) -> None:
        self._exit.close()

    def check(self) -> None:
        """Refuse a block in which there was nothing to see, or not what was chosen."""
        self._tracker.check()
        self._selection.check(self._tracker.layers)

    def notice(self, call: AttentionCall, edited: AttentionCall | None) -> tuple[AttentionCall, Reading] | None:
        """Place a call of the watched model, and say what to read of what runs."""
        named = self._tracker.name(call)
        if named is None or not self._selection.wants(named.path, named.layer):
            return None
        heads = self._selection.heads(named.path, named.layer, named.query.shape[1])
        placed, text = self._tracker.place(named)
        if text.token_ids is not None and text.token_ids.shape[1] == text.end:
            self.recording.token_ids = text.token_ids
        placed = replace(placed if edited is None else edited.placed_as(placed), token_mask=self._mask_of(placed))
        return named, _Reading(self, placed, self._sequence(placed.path, text), heads)

    def record(self, call: AttentionCall, sequence: Sequence, part: Part, attention: TokenMap) -> None:
        """Keep what was measured."""
        if call.path not in self.recording.layers:
            self.recording.layers.append(call.path)
        sequence.parts.append(part)
        if self._keep_maps:
            self.recording.maps.setdefault(call.path, []).append(attention)

    def _sequence(self, path: str, text: Text) -> Sequence:
        sequences = self.recording._sequences.setdefault(path, [])
        if not sequences or sequences[-1].text is not text:
            sequences.append(Sequence(text))
        return sequences[-1]

    def _mask_of(self, call: AttentionCall) -> Tensor | None:
        mask = self._token_mask
        if mask is None:
            return None
        batch, _, queries, _ = call.query.shape
        end = call.query_start + queries
        if batch % mask.shape[0] or (call.query_start == 0 and queries != mask.shape[1]):
            raise ValueError(
                f"token_mask has shape {tuple(mask.shape)}, but {call.path} has a batch of {batch} with {queries} queries; "
                "watch only the layers that it belongs to, with layers="
            )
        mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)  # the beams of one text follow one another
        return torch.nn.functional.pad(mask, (0, max(end - mask.shape[1], 0)), value=True)[:, call.query_start : end]


@dataclass
class _Reading:
    """What one block reads of one call."""

    block: _Block
    call: AttentionCall
    sequence: Sequence
    heads: list[int] | None

    def __post_init__(self) -> None:
        self._own: TokenMap | None = None
        if self.heads is not None:
            self.call = self.call.heads(self.heads)

    @property
    def shares(self) -> bool:
        """Whether the model's output may come from the pass that answers the questions."""
        return self.block.share and self.heads is None

    def ask(self, attention: TokenMap) -> None:
        """Have each statistic announce what it needs."""
        for statistic in self.block.statistics:
            with _told(statistic, self.call):
                statistic.ask(self._map(attention), self.call)

    def take(self, attention: TokenMap) -> None:
        """Measure each statistic."""
        attention = self._map(attention)
        measured: dict[str, Tensor] = {}
        for statistic in self.block.statistics:
            with _told(statistic, self.call):
                result = statistic.measure(attention, self.call)
            named = result if isinstance(result, Mapping) else {statistic.name: result}
            for name, dims in statistic.dimensions().items():
                measured[name] = self._masked(named[name], dims).cpu()
        _, _, queries, keys = attention.shape
        heads = list(range(attention.shape[1])) if self.heads is None else self.heads
        part = Part(self.call.query_start, self.call.key_start, queries, keys, heads, measured)
        self.block.record(self.call, self.sequence, part, attention)

    def _map(self, attention: TokenMap) -> AttentionMap:
        """The map of the chosen heads; it has an AttentionMap's interface, and refuses what it cannot answer."""
        if self._own is None:
            self._own = attention if self.heads is None else attention.heads(self.heads)
        return cast(AttentionMap, self._own)

    def _masked(self, values: Tensor, dims: tuple[str, ...]) -> Tensor:
        """NaN for padded queries."""
        mask = self.call.token_mask
        if mask is None or "query" not in dims:
            return values
        shape = [1] * values.ndim
        shape[0], shape[2 + dims.index("query")] = mask.shape
        return values.masked_fill(~mask.to(values.device).view(shape), torch.nan)


@contextmanager
def _told(statistic: Statistic, call: AttentionCall) -> Iterator[None]:
    """Say where a map has no answer to what a statistic asks."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(statistic).__name__} of {call.path}: {error}; leave out the statistic, or the layer with layers="
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


def _check_mask(token_mask: Tensor) -> Tensor:
    if token_mask.ndim != 2:
        raise ValueError(f"token_mask must be (batch, tokens), got shape {tuple(token_mask.shape)}")
    return token_mask.bool()
