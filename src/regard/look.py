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
from regard.estimate import Estimate, estimate
from regard.maps import TokenMap
from regard.runtime import AttentionCall, HiddenCall, Proceed, Reading, Site, entered
from regard.tokens import Encoded, Layers, encode, spelling_of
from regard.view import RunFacts, report
from regard.watch import At, Entropy, Mass, MeanDistance, Pooled, Received, Statistic, watch, with_tokens

_NEAR = 8
_PICTURE = 64
_BY_TOKENS = ("induction", "induction by chance", "retrieval", "retrieval by chance")

Progress = Callable[[str, float], None]


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
    progress: Progress = lambda path, share: None,
    announce: Callable[[Estimate], None] = lambda estimate: None,
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
        progress: called as layers and strips of them have been measured, with the layer's path and the share of all
            layers that is done; from several threads.
        announce: called before the run with what it will take.

    Raises:
        IndexError, ValueError: as `regard.tokens.encode`; layers that match no attention call, before the run.
    """
    started = time.perf_counter()
    windows = encode(model, tokenizer, text, max_tokens=max_tokens, window=window)
    device = next(model.parameters()).device
    inputs = [encoded.inputs for encoded in windows]
    expected = estimate(model, inputs, layers, _statistics, _peak_memory(device), **_no_cache(model))
    announce(expected)
    counter = _Progress(progress, expected, len(windows))
    recorded = [_record(model, encoded, counter, layers) for encoded in windows]
    tokens = [tokenizer.convert_ids_to_tokens(encoded.inputs["input_ids"][0].tolist()) for encoded in windows]
    dataset = with_tokens(_joined(recorded), tokens, spelling_of(tokenizer))
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


def _joined(recorded: list[xarray.Dataset]) -> xarray.Dataset:
    """The windows along "batch"; one of them as it is, for it may be large."""
    return recorded[0] if len(recorded) == 1 else xarray.concat(recorded, "batch", join="outer")


class _Progress:
    """Tells how much was done as layers and their strips are, and counts the entries that stored matrices would have."""

    edits = outermost = False

    def __init__(self, tell: Progress, expected: Estimate, windows: int) -> None:
        self.entries = 0
        self._tell, self._paths = tell, expected.calls
        self._done, self._total = 0, len(expected.calls) * windows

    def wants(self, site: Site) -> bool:
        """Whether its layer is watched."""
        return site.path in self._paths

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The call's output, and words of it."""
        path = call.place.path

        def tell(share: float) -> None:
            self._tell(path, min((self._done + share) / self._total, 1.0))

        def listen(attention: TokenMap, last: object) -> Callable[[], None]:
            self.entries += torch.Size(attention.shape).numel()
            attention.tell_progress(tell)
            return lambda: None

        output = proceed(call.with_reading(Reading(listen)))
        self._done += 1
        tell(0.0)
        return output


def _statistics(tokens: int, special: Tensor | None = None) -> list[Statistic]:
    """What a report shows, of a text of so many tokens; without its special tokens, for measuring what that takes."""
    sink = torch.zeros(tokens, dtype=torch.bool) if special is None else special.clone()
    sink[0] = True  # models without special tokens make their first token the sink
    offsets = {f"{offset:+d}": offset for offset in range(-_NEAR, _NEAR + 1) if abs(offset) > 1}
    ids = torch.zeros(1, tokens, dtype=torch.long) if special is None else None
    return [
        Entropy(),
        Received(),
        Mass({"sink": sink}),
        At("previous", "own", "next", *_BY_TOKENS, targets=offsets, token_ids=ids),
        MeanDistance(),
        Pooled(-(-tokens // _PICTURE)),
    ]


def _record(model: Module, encoded: Encoded, counter: _Progress, layers: Layers | None) -> xarray.Dataset:
    statistics = _statistics(len(encoded.special), encoded.special)
    with torch.inference_mode(), entered(counter, model), watch(model, *statistics, layers=layers) as seen:
        model(**encoded.inputs, **_no_cache(model))
    return seen.dataset()


def _no_cache(model: Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}


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
