"""Language models and their tokenizers: where they are loaded, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path, device: str = "cpu", dtype: str | None = None, *, language: bool = False
) -> tuple[Module, Any]:
    """A model and its tokenizer by folder or name, in evaluation mode and with fused attention.

    Args:
        model: a folder with a transformers model and its tokenizer, a .gguf file, which holds both and whose weights become
            plain numbers, or a name on the hub.
        device: where to put it.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU, elsewhere that of the weights.
        language: a causal language model that writes, instead of the bare encoder or decoder.

    Raises:
        ImportError: transformers is not installed, or for a .gguf file what reads it.
        ValueError: a dtype of another name; a device that is not here; a model that is not there or cannot be loaded.

    >>> import regard
    >>> model, tokenizer = load(regard.mini.path(), language=True)
    >>> type(model).__name__
    'LlamaForCausalLM'
    """
    try:
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError('loading models needs transformers: pip install "regard[hf]"') from error
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    _check_device(device)
    numbers = _DTYPES["float32"] if dtype is None and device == "cpu" else _DTYPES.get(dtype or "", "auto")
    place, file = _place(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **file)
        kind = AutoModelForCausalLM if language else AutoModel
        loaded = kind.from_pretrained(place, attn_implementation="sdpa", dtype=numbers, **file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load a model and its tokenizer from {str(model)!r}: {error}") from error
    if loaded.config.is_encoder_decoder and not language:
        loaded = loaded.get_encoder()
    return loaded.eval().to(device), tokenizer


def _check_device(device: str) -> None:
    """Refuse a device that is not here before anything is loaded."""
    accelerator = torch.accelerator.current_accelerator()
    here = ["cpu"]
    if accelerator is not None:
        here += [accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]
    if device not in here:
        raise ValueError(f"there is no device {device!r} for PyTorch {torch.__version__} here, only {', '.join(here)}")


def _place(model: str | Path) -> tuple[str | Path, dict[str, str]]:
    """What transformers is given for a folder, a file or a name: where it is, and beside that the name of a .gguf file."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {str(model)!r}")
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            raise ImportError(f'reading a .gguf file needs {" and ".join(missing)}: pip install "regard[gguf]"')
        return path.parent, {"gguf_file": path.name}
    if str(model).startswith(("/", ".", "~")) and not path.is_dir():
        raise ValueError(f"there is no folder {str(model)!r}")
    return path if path.is_dir() else model, {}


@dataclass(frozen=True)
class Written:
    """What a model wrote: ``tokens``, the ``logits`` (vocabulary,) from which each was chosen, and the ``text`` of it."""

    tokens: list[int]
    logits: list[Tensor]
    text: str


def write(model: Any, tokenizer: Any, inputs: Mapping[str, Tensor], tokens: int) -> Written:
    """The likeliest token after a text, so many times; fewer where the model ends the text.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        inputs: what it reads, as `regard.tokens.encode` makes it.
        tokens: how many to write.

    >>> import regard
    >>> model, tokenizer = regard.mini()
    >>> inputs = tokenizer("The code of Ada is 48213. They slept. The code of Ada is", return_tensors="pt")
    >>> write(model, tokenizer, inputs, 6).text
    ' 48213'
    """
    if not tokens:
        return Written([], [], "")
    with torch.inference_mode():
        written = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    found = written.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logits = [row[0].float().cpu() for row in written.logits]
    return Written(found, logits, str(tokenizer.decode(found, skip_special_tokens=True)))


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts' tokens differ; None if there is none.

    >>> parting([1, 2, 3], [1, 2, 4]), parting([1, 2], [1, 2])
    (2, None)
    """
    pairs = zip(one, other, strict=False)
    return next((number for number, (token, its) in enumerate(pairs) if token != its), None)
