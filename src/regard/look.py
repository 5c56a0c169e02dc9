"""The main job: a model and a text in, everything that a report shows out."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import xarray
from torch import Tensor
from torch.nn import Module

import regard
from regard.inputs import Reading, Tokens, read
from regard.inputs.audio import Samples
from regard.mixers.magnitudes import InMagnitudes
from regard.questions import questions
from regard.runtime import AttentionCall, HiddenCall, Proceed, Site, entered
from regard.tokens import Layers, Selection
from regard.view import RunFacts, ShownPart, report
from regard.watch import save, watch

if TYPE_CHECKING:
    from PIL.Image import Image

_WITHOUT_ATTENTION = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
"""What transformers calls layers that mix tokens otherwise."""

Progress = Callable[[str, int | None], None]


@dataclass(frozen=True)
class Look:
    """What a model did with what it read: its ``parts`` as recorded, ``facts`` of the run, ``notes`` on what was read."""

    parts: tuple[ShownPart, ...]
    facts: RunFacts
    notes: tuple[str, ...] = ()

    @property
    def dataset(self) -> xarray.Dataset:
        """What was recorded, where there is but one part.

        Raises:
            ValueError: there are several, such as encoder, decoder and cross-attention; each has its own.
        """
        if len(self.parts) > 1:
            names = ", ".join(part.name for part in self.parts)
            raise ValueError(f"there are {len(self.parts)} parts, each with a dataset of its own: {names}")
        return self.parts[0].dataset

    def html(self) -> str:
        """The report, one self-contained page."""
        return report(self.parts, self.facts, self.notes)

    def save(self, path: str | Path) -> list[Path]:
        """Write the dataset as netCDF, one file for each part where there are several, and return the files' paths."""
        path = Path(path)
        files = [path]
        if len(self.parts) > 1:
            words = [re.sub(r"\W+", "-", part.name.lower()) for part in self.parts]
            files = [path.with_name(f"{path.stem}.{word}{path.suffix}") for word in words]
        for file, part in zip(files, self.parts, strict=True):
            save(part.dataset, file)
        return files


def look(
    model: Module,
    processor: Any,
    text: str | None = None,
    *,
    pair: str | None = None,
    target: str | None = None,
    image: str | Path | Image | None = None,
    audio: str | Path | Samples | None = None,
    model_name: str = "",
    text_name: str = "",
    layers: Layers | None = None,
    max_tokens: int | None = None,
    window: bool = False,
    progress: Progress = lambda path, total: None,
) -> Look:
    """Run a model on what it is made to read, and record what a report shows.

    Args:
        model: a transformers model with attn_implementation="sdpa".
        processor: its tokenizer, its image processor, or the processor that holds them.
        text: any length that the model has positions for.
        pair: a second text, for models that compare two.
        target: what the decoder reads, for models with an encoder and a decoder; by default what the model writes.
        image: a file, or an image of Pillow, for models that see.
        audio: a .wav file, or samples, for models that listen.
        model_name: said in the report.
        text_name: said in the report.
        layers: which to watch, as for `regard.watch`; all by default.
        max_tokens: read so many tokens of the text, special ones included, and no more.
        window: cut a longer text into windows of the model's length, each read on its own.
        progress: called for each layer when it has been measured, with its path and the number of calls to expect.

    Raises:
        ValueError: as `regard.inputs.read`; layers that leave nothing to watch.
    """
    started = time.perf_counter()
    readings = read(
        model, processor, text, pair=pair, target=target, image=image, audio=audio, max_tokens=max_tokens, window=window
    )
    counter = _Progress(progress, _count_calls(model, readings, layers), layers)
    by_size = InMagnitudes()
    recorded = [_record(reading, layers, counter, by_size) for reading in readings]
    chosen = [number for number, dataset in enumerate(recorded[0]) if dataset is not None]
    parts = tuple(_shown(number, readings, recorded) for number in chosen)
    device = next(model.parameters()).device
    facts = RunFacts(
        model=model_name or type(model).__name__,
        text=text_name,
        tokens=sum(_count_tokens(reading) for reading in readings),
        layers=sum(part.dataset.sizes["layer"] for part in parts),
        heads=max(part.dataset.sizes["head"] for part in parts),
        seconds=time.perf_counter() - started,
        peak_memory=_peak_memory(device),
        stored_memory=counter.entries * next(model.parameters()).element_size(),
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        version=regard.__version__,
    )
    return Look(parts, facts, (*readings[0].notes, *by_size.notes(), *_without_attention(model, len(by_size.read))))


def _without_attention(model: Any, read: int) -> list[str]:
    """A line on layers that have none, and are not known by the matrices that they hide either."""
    config = model.config.get_text_config() if hasattr(getattr(model, "config", None), "get_text_config") else None
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = [kind for kind in kinds if kind in _WITHOUT_ATTENTION]
    if len(others) <= read:
        return []
    named = ", ".join(sorted(set(others)))
    return [
        f"not shown: {len(others) - read} of {len(kinds)} layers, which have no attention ({named}) and no known matrix"
    ]


def _count_calls(model: Module, readings: Sequence[Reading], layers: Layers | None) -> int | None:
    """How many calls there will be, where that can be told."""
    calls = sum(len(chosen) for reading in readings for chosen in _by_part(reading, layers) if isinstance(chosen, list))
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return calls or (len(readings) * depth if depth and layers is None else None)


def _by_part(reading: Reading, layers: Layers | None) -> list[Layers | None]:
    """The layers to watch of each part of a reading: paths, none where nothing of a part was chosen."""
    if not reading.calls:
        return [layers] * len(reading.parts)
    selection, paths = Selection(layers), dict(enumerate(dict.fromkeys(call.path for call in reading.calls)))
    selection.check(paths)
    chosen = {path for number, path in paths.items() if selection.wants(path, number, len(paths))}
    if not any(chosen & set(part.layers or ()) for part in reading.parts):
        raise ValueError(f"of the chosen layers none is among what is shown: {', '.join(sorted(chosen)[:3])}")
    return [[path for path in part.layers or () if path in chosen] for part in reading.parts]


def _shown(number: int, readings: Sequence[Reading], recorded: Sequence[Sequence[xarray.Dataset | None]]) -> ShownPart:
    """One part of the attention, its windows one after another, with the names of its tokens."""
    parts = [reading.parts[number] for reading in readings]
    windows = [dataset for window in recorded if (dataset := window[number]) is not None]
    dataset = xarray.concat(windows, "batch", join="outer")
    for dim, tokens in (("query", [part.queries for part in parts]), ("key", [part.keys for part in parts])):
        dataset = _named(dataset, dim, tokens, parts[0].name)
    return ShownPart(parts[0].name, dataset, parts[0].keys.picture)


def _named(dataset: xarray.Dataset, dim: str, windows: Sequence[Tokens], name: str) -> xarray.Dataset:
    """The dataset with the tokens' names along a dimension, and the segments that they are of, where there are some."""
    size = dataset.sizes[dim]
    if size != max(map(len, windows)):
        raise ValueError(f"{name}: {max(map(len, windows))} tokens were read, but the calls have {size} along {dim!r}")
    labels = [[*tokens.names, *[""] * (size - len(tokens))] for tokens in windows]
    spelling = {"spelling": windows[0].spelling} if windows[0].spelling else {}
    dataset = dataset.assign_coords({f"{dim}_token": (("batch", dim), numpy.array(labels, dtype=object), spelling)})
    if not windows[0].segments:
        return dataset
    of_token = numpy.full((len(windows), size), "", dtype=object)
    for number, tokens in enumerate(windows):
        for segment, positions in tokens.segments.items():
            of_token[number, list(positions)] = segment
    return dataset.assign_coords({f"{dim}_segment": (("batch", dim), of_token)})


def _count_tokens(reading: Reading) -> int:
    """Tokens of each sequence that was read, each counted once."""
    read_once = {id(tokens): len(tokens) for part in reading.parts for tokens in (part.queries, part.keys)}
    return sum(read_once.values())


class _Progress:
    """Tells of each layer when it has run, and counts the entries that its stored matrix would have."""

    edits = outermost = False

    def __init__(self, tell: Progress, total: int | None, layers: Layers | None) -> None:
        self.entries = 0
        self._tell = tell
        self._total = total
        self._selection = Selection(layers)

    def wants(self, site: Site) -> bool:
        """Whether its layer is watched."""
        return self._selection.wants(site.path, site.layer)

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output, and a word of it."""
        output = proceed(call)
        batch, heads, keys, _ = call.value.shape
        if isinstance(call, HiddenCall):
            self.entries += batch * heads * call.queries * keys
        else:
            self.entries += call.query.shape[:3].numel() * keys
        self._tell(call.place.path, self._total)
        return output


def _record(
    reading: Reading, layers: Layers | None, counter: _Progress, by_size: InMagnitudes
) -> list[xarray.Dataset | None]:
    """What each part's calls tell in one pass; None of a part of which nothing was chosen."""
    with torch.inference_mode(), ExitStack() as blocks:
        for interceptor in (counter, by_size):
            blocks.enter_context(entered(interceptor, reading.model))
        seen = [
            None if chosen == [] else blocks.enter_context(watch(reading.model, *questions(part), layers=chosen))
            for part, chosen in zip(reading.parts, _by_part(reading, layers), strict=True)
        ]
        reading.run()
    return [None if recording is None else recording.dataset() for recording in seen]


def _peak_memory(device: torch.device) -> int:
    """The most memory held by the process, or on a GPU by its tensors, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux may be the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
