"""The main job: a model and a text in, everything that a report shows out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray
from torch import Tensor
from torch.nn import Module

import regard
from regard.calls import AttentionCall, Layers
from regard.maps import AttentionMap
from regard.view import RunFacts, report
from regard.watch import At, Entropy, Mass, MeanDistance, Pooled, Received, Statistic, watch, with_tokens

_NEAR = 8
_PICTURE = 64
_NO_LIMIT = 10**9
_INPUTS = ("input_ids", "attention_mask", "special_tokens_mask")

Progress = Callable[[str, int | None], None]


@dataclass(frozen=True)
class Look:
    """What a model did on a text: ``dataset`` as recorded, ``facts`` of the run."""

    dataset: xarray.Dataset
    facts: RunFacts

    def html(self) -> str:
        """The report, one self-contained page."""
        return report(self.dataset, self.facts)


def load(
    model: str | Path, device: str = "cpu", dtype: str | None = None, *, language: bool = False
) -> tuple[Module, Any]:
    """A model and its tokenizer by folder or name, ready to be looked at.

    Args:
        model: a folder with a transformers model and its tokenizer, or a name on the hub.
        device: where to put it.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU, elsewhere that of the weights.
        language: a causal language model that writes, instead of the bare encoder or decoder.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a dtype of another name; a model that is not there or cannot be loaded.
    """
    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError('looking at models needs transformers: pip install "regard[hf]"') from error
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    numbers = known["float32"] if dtype is None and device == "cpu" else known.get(dtype or "", "auto")
    if str(model).startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise ValueError(f"there is no folder {str(model)!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        kind = AutoModelForCausalLM if language else AutoModel
        loaded = kind.from_pretrained(model, attn_implementation="sdpa", dtype=numbers)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a model and its tokenizer from {str(model)!r}: {error}") from error
    if loaded.config.is_encoder_decoder and not language:
        loaded = loaded.get_encoder()
    return loaded.eval().to(device), tokenizer


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
        max_tokens: read the text's first tokens only.
        window: cut a longer text into windows of the model's length, each read on its own.
        progress: called for each layer when it has been measured, with its path and the number of calls to expect.

    Raises:
        ValueError: an empty text; one longer than the model's positions, without ``window``.
    """
    started = time.perf_counter()
    windows = _encode(tokenizer, text, _positions(model, tokenizer), max_tokens, window)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    counter = _Counter(progress, len(windows) * depth if depth and layers is None else None)
    recorded = [_record(model, tokenizer, encoded, layers, counter) for encoded in windows]
    tokens = [tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist()) for encoded in windows]
    dataset = with_tokens(xarray.concat(recorded, "batch", join="outer"), tokens)
    device = next(model.parameters()).device
    facts = RunFacts(
        model=model_name or type(model).__name__,
        text=text_name,
        tokens=sum(encoded["input_ids"].shape[1] for encoded in windows),
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


class _Counter(Statistic):
    """Tells of each layer as it is measured, and counts the entries that its stored matrix would have."""

    name = "counter"

    def __init__(self, progress: Progress, total: int | None) -> None:
        self.entries = 0
        self._progress = progress
        self._total = total

    def measure(self, attention: AttentionMap, call: AttentionCall) -> Mapping[str, Tensor]:
        """Nothing that is recorded."""
        self.entries += torch.Size(attention.shape).numel()
        self._progress(call.path, self._total)
        return {}

    def dimensions(self) -> Mapping[str, tuple[str, ...]]:
        """Of no dimensions: nothing is kept, only the calls are counted."""
        return {}


def _record(
    model: Module, tokenizer: Any, encoded: Mapping[str, Tensor], layers: Layers | None, counter: _Counter
) -> xarray.Dataset:
    inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in encoded.items()}
    special = inputs.pop("special_tokens_mask")[0].bool()
    special[0].fill_(True)  # models without special tokens make their first token the sink
    ids = inputs["input_ids"]
    offsets = {f"{offset:+d}": offset for offset in range(-_NEAR, _NEAR + 1) if abs(offset) > 1}
    no_cache = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
    with (
        torch.inference_mode(),
        watch(
            model,
            Entropy(),
            Received(),
            Mass({"sink": special}),
            At("previous", "own", "next", "retrieval", targets={"induction": "repeated", **offsets}),
            MeanDistance(),
            Pooled(-(-ids.shape[1] // _PICTURE)),
            counter,
            layers=layers,
        ) as seen,
    ):
        model(**inputs, **no_cache)
    return seen.dataset()


def _encode(tokenizer: Any, text: str, limit: int, max_tokens: int | None, window: bool) -> list[dict[str, Tensor]]:
    """The text's tokens, in windows of at most ``limit``."""
    if not text.strip():
        raise ValueError("the text is empty")
    if max_tokens:
        first = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
        text = text[: max(end for _, end in first["offset_mapping"])]
    whole = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    tokens = len(whole["input_ids"])
    if tokens <= limit:
        return [_tensors({name: whole[name] for name in _INPUTS})]
    if not window:
        raise ValueError(
            f"the text has {tokens:,} tokens, but the model has positions for {limit:,}; "
            f"pass --window to read it in windows of {limit:,}, or --max-tokens {limit} to read its beginning"
        )
    parts = tokenizer(
        text, truncation=True, max_length=limit, return_overflowing_tokens=True, return_special_tokens_mask=True
    )
    return [_tensors({name: parts[name][number] for name in _INPUTS}) for number in range(len(parts["input_ids"]))]


def _tensors(encoded: Mapping[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([values]) for name, values in encoded.items()}


def _positions(model: Module, tokenizer: Any) -> int:
    """The most tokens that the model reads at once."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    of_model = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    return int(min(of_model, tokenizer.model_max_length))


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
