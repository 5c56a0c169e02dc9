"""The main job: a model and a text in, everything that a report shows out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray
from torch import Tensor
from torch.nn import Module

import regard
from regard.runtime import AttentionCall, Proceed, Site, entered
from regard.tokens import Encoded, Layers, Selection, encode, spelling_of
from regard.view import RunFacts, report
from regard.watch import At, Entropy, Mass, MeanDistance, Pooled, Received, watch, with_tokens

_NEAR = 8
_PICTURE = 64

Progress = Callable[[str, int | None], None]


@dataclass(frozen=True)
class Look:
    """What a model did on a text: ``dataset`` as recorded, ``facts`` of the run."""

    dataset: xarray.Dataset
    facts: RunFacts

    def html(self) -> str:
        """The report, one self-contained page."""
        return report(self.dataset, self.facts)


def look(
    model: Module,
    tokenizer: Any,
    text: str,
    *,
    model_name: str = "",
    text_name: str = "",
    layers: Layers | None = None,
    max_tokens: int | None = None,
    window: bool = False,
    progress: Progress = lambda path, total: None,
) -> Look:
    """Run a model on a text and record what a report shows.

    Args:
        model: a transformers model with attn_implementation="sdpa".
        tokenizer: its tokenizer.
        text: any length that the model has positions for.
        model_name: said in the report.
        text_name: said in the report.
        layers: which to watch, as for `regard.watch`; all by default.
        max_tokens: read so many tokens of the text, special ones included, and no more.
        window: cut a longer text into windows of the model's length, each read on its own.
        progress: called for each layer when it has been measured, with its path and the number of calls to expect.

    Raises:
        ValueError: as `regard.tokens.encode`.
    """
    started = time.perf_counter()
    windows = encode(model, tokenizer, text, max_tokens=max_tokens, window=window)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    counter = _Progress(progress, len(windows) * depth if depth and layers is None else None, layers)
    recorded = [_record(model, tokenizer, encoded, layers, counter) for encoded in windows]
    tokens = [tokenizer.convert_ids_to_tokens(encoded.inputs["input_ids"][0].tolist()) for encoded in windows]
    dataset = with_tokens(xarray.concat(recorded, "batch", join="outer"), tokens, spelling_of(tokenizer))
    device = next(model.parameters()).device
    facts = RunFacts(
        model=model_name or type(model).__name__,
        text=text_name,
        tokens=sum(encoded.inputs["input_ids"].shape[1] for encoded in windows),
        layers=dataset.sizes["layer"],
        heads=dataset.sizes["head"],
        seconds=time.perf_counter() - started,
        peak_memory=_peak_memory(device),
        stored_memory=counter.entries * next(model.parameters()).element_size(),
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        version=regard.__version__,
    )
    return Look(dataset, facts)


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

    def intercept(self, call: AttentionCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output, and a word of it."""
        output = proceed(call)
        self.entries += call.query.shape[:3].numel() * call.key.shape[2]
        self._tell(call.place.path, self._total)
        return output


def _record(
    model: Module, tokenizer: Any, encoded: Encoded, layers: Layers | None, counter: _Progress
) -> xarray.Dataset:
    special = encoded.special.clone()
    special[0] = True  # models without special tokens make their first token the sink
    offsets = {f"{offset:+d}": offset for offset in range(-_NEAR, _NEAR + 1) if abs(offset) > 1}
    no_cache = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    with (
        torch.inference_mode(),
        entered(counter, model),
        watch(
            model,
            Entropy(),
            Received(),
            Mass({"sink": special}),
            At("previous", "own", "next", "retrieval", targets={"induction": "repeated", **offsets}),
            MeanDistance(),
            Pooled(-(-len(special) // _PICTURE)),
            layers=layers,
        ) as seen,
    ):
        model(**encoded.inputs, **no_cache)
    return seen.dataset()


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
