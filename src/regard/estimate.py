"""What reading a text and recording it will take, from a short probe of the model and of its attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import scaled_dot_product_attention

from regard.runtime import AttentionCall, HiddenCall, Proceed, Site, entered
from regard.tokens import Layers, Selection
from regard.watch import Statistic, watch

# The probe is of a small part of the text: so many tokens at least and at most, of the model and of one attention call.
_MODEL, _ATTENTION = (8, 256), (128, 1024)
_MODEL_PART, _ATTENTION_PART = 32, 8
# From so many tokens on it is also timed.
_WORTH_IT = 1024
# How many times a recording's numbers are held while they are put together.
_COPIES = 4

Statistics = Callable[[int], Sequence[Statistic]]


@dataclass(frozen=True)
class Shape:
    """An attention call's heads and their width."""

    heads: int
    key_heads: int
    width: int
    is_causal: bool


@dataclass(frozen=True)
class Estimate:
    """What a run will take: ``seconds``, None where too short to be probed, and ``memory`` at its peak, in bytes.

    ``calls`` are the attention calls that one window makes and that are watched, by path.

    >>> print(Estimate({}, 8000, 270, 61.0, 2 * 10**9))
    8,000 tokens, 270 heads: about 61 s and 2.0 GB
    """

    calls: Mapping[str, Shape]
    tokens: int
    heads: int
    seconds: float | None
    memory: int

    def __str__(self) -> str:
        what = f"{self.tokens:,} tokens, {self.heads:,} heads"
        if self.seconds is None:
            return what
        time_taken = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{what}: about {time_taken} and {self.memory / 1e9:.1f} GB"


def estimate(
    model: Module,
    inputs: Sequence[Mapping[str, Tensor]],
    layers: Layers | None,
    statistics: Statistics,
    held: int,
) -> Estimate:
    """Run the beginning of the first window, and one attention call of some tokens; refuse layers that there are not.

    Args:
        model: what will run.
        inputs: its arguments for each window, tensors (1, tokens).
        layers: those to be watched, as for `regard.watch`.
        statistics: those that will be read, of a text of so many tokens.
        held: bytes in use already.

    Raises:
        IndexError, ValueError: layers that match no attention call.
    """
    arguments = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    lengths = [next(iter(window.values())).shape[1] for window in inputs]
    worth_it = sum(lengths) >= _WORTH_IT
    tokens = min(lengths[0], _part(lengths[0], _MODEL_PART, _MODEL))
    beginning = {name: tensor[:, :tokens] for name, tensor in inputs[0].items()}
    calls = _calls(model, beginning, layers, arguments)
    shapes = list(calls.values())
    seconds = None
    if worth_it:
        per_token = _seconds(model, lambda: model(**beginning, **arguments)) / tokens
        some = _part(max(lengths), _ATTENTION_PART, _ATTENTION)
        per_pair = {shape: _seconds_per_pair(model, shape, statistics, some) for shape in set(shapes)}
        pairs = sum(length**2 for length in lengths)
        seconds = sum(lengths) * per_token + pairs * sum(per_pair[shape] for shape in shapes)
    memory = held + _recorded(shapes, lengths, statistics) + _working(model, shapes, max(lengths))
    return Estimate(calls, sum(lengths), sum(shape.heads for shape in shapes), seconds, memory)


def _part(tokens: int, part: int, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return min(max(tokens // part, least), most)


class _Calls:
    """Notes each attention call's place and shape."""

    edits = outermost = False

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}
        self.shapes: dict[int, Shape] = {}

    def wants(self, site: Site) -> bool:
        """All of them."""
        self.paths[site.layer] = site.path
        return True

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's own output."""
        if isinstance(call, AttentionCall):
            heads, width = call.query.shape[1], call.query.shape[3]
            shape = Shape(heads, call.key.shape[1], width, call.is_causal or call.attn_mask is not None)
        else:
            heads, width = call.value.shape[1], call.value.shape[3]
            shape = Shape(heads, heads, width, True)
        self.shapes[call.place.layer] = shape
        return proceed(call)


def _calls(
    model: Module, beginning: Mapping[str, Tensor], layers: Layers | None, arguments: Mapping[str, Any]
) -> dict[str, Shape]:
    """The watched calls of a pass, by path."""
    noted, selection = _Calls(), Selection(layers)
    with torch.inference_mode(), entered(noted, model):
        model(**beginning, **arguments)
    selection.check(noted.paths)
    number = max(noted.paths, default=-1) + 1
    return {
        path: noted.shapes[layer]
        for layer, path in noted.paths.items()
        if layer in noted.shapes and selection.wants(path, layer, number)
    }


def _seconds(model: Module, run: Callable[[], object]) -> float:
    with torch.inference_mode():
        started = time.perf_counter()
        run()
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - started


def _seconds_per_pair(model: Module, shape: Shape, statistics: Statistics, tokens: int) -> float:
    """What one call of this shape takes, read and answered, for each pair of a query and a key."""
    like = next(model.parameters())

    def run(tokens: int) -> None:
        query, key, value = (
            torch.randn(1, heads, tokens, shape.width, dtype=like.dtype, device=like.device)
            for heads in (shape.heads, shape.key_heads, shape.key_heads)
        )
        with watch(None, *statistics(tokens)):
            scaled_dot_product_attention(query, key, value, is_causal=shape.is_causal, enable_gqa=True)

    for _ in range(2):  # what is compiled once
        _seconds(model, lambda: run(tokens // 4))
    return _seconds(model, lambda: run(tokens)) / tokens**2


def _recorded(shapes: Sequence[Shape], lengths: Sequence[int], statistics: Statistics) -> int:
    """Bytes of all that is recorded, while it is put together."""
    numbers = 0
    for length in lengths:
        for statistic in statistics(length):
            labels = statistic.coordinates()
            for dims in statistic.dimensions().values():
                size = 1
                for dim in dims:
                    size *= length if dim in ("query", "key") else len(labels.get(dim, range(64)))
                numbers += size * sum(shape.heads for shape in shapes)
    return 4 * _COPIES * numbers


def _working(model: Module, shapes: Sequence[Shape], length: int) -> int:
    """Bytes that one layer needs while it runs: its widest numbers, and a picture's sums."""
    widest = max((module.out_features for module in model.modules() if isinstance(module, Linear)), default=0)
    heads = max((shape.heads for shape in shapes), default=0)
    return 4 * length * (3 * widest + 64 * heads)
