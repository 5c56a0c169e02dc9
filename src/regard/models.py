"""Models and what prepares their inputs: where they are loaded, and what language models write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """A model and its tokenizer or processor by folder or name, in evaluation mode and with fused attention.

    Args:
        model: a folder with a transformers model and what prepares its inputs, a .gguf file, which holds both and whose
            weights become plain numbers, or a name on the hub.
        device: where to put it.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU, elsewhere that of the weights.
        language: a causal language model that writes, instead of the bare encoder or decoder. Of models that make texts of
            texts or recordings it is in any case the one that writes, if the weights for that are there.

    Returns:
        The model, and its tokenizer, its image processor, or the processor that holds several of them.

    Raises:
        ImportError: transformers is not installed, or for a .gguf file what reads it.
        ValueError: a dtype of another name; a device that is not here; a model that is not there or cannot be
            loaded, or with ``language`` one of another kind or without its head.

    >>> import regard
    >>> model, tokenizer = load(regard.mini.path(), language=True)
    >>> type(model).__name__
    'LlamaForCausalLM'
    """
    try:
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    except ImportError as error:
        raise ImportError('loading models needs transformers: pip install "regard[hf]"') from error
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    _check_device(device)
    numbers = _DTYPES["float32"] if dtype is None and device == "cpu" else _DTYPES.get(dtype or "", "auto")
    place, file = _place(model)
    with _said_in_a_line(model):
        config = AutoConfig.from_pretrained(place, **file)
    if language:
        _check_goes_on(config)
    with _said_in_a_line(model):
        prepares = AutoTokenizer if language or file else AutoProcessor
        processor = prepares.from_pretrained(place, **file)
        loaded, missing = _load(place, config, language, dtype=numbers, **file)
    if language and missing:
        raise ValueError(
            f"{str(model)!r} has no weights for {', '.join(sorted(missing)[:3])}: {config.model_type} would write at random"
        )
    if not language:
        _show_hidden_maps(loaded)
    return loaded.eval().to(device), processor


def _show_hidden_maps(model: Any) -> None:
    """Put mixers of equal outputs, whose matrices can be seen, in the place of the linear layers that are known as such."""
    if not any(name.endswith((".mixer", ".linear_attn")) for name, _ in model.named_modules()):
        return  # without a look at what is known, which takes seconds to import
    from regard.mixers import replace_linear_layers
    from regard.mixers.checkpoints import linear_layers

    try:
        linear_layers(model)
    except ValueError:  # there are layers of such names in other models too
        return
    replace_linear_layers(model)


@contextmanager
def _said_in_a_line(model: str | Path) -> Iterator[None]:
    """Errors of transformers and safetensors as one that names the model."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]  # what follows may name every model that there is
        raise ValueError(f"cannot load a model and its tokenizer from {str(model)!r}: {first}") from error


def _load(place: str | Path, config: Any, language: bool, **options: Any) -> tuple[Any, set[str]]:
    """A model, and which of its weights are not there.

    It has a head where it is to write, or turns texts or recordings into texts and the weights of that head are there.
    """
    import transformers

    kinds = [transformers.AutoModelForCausalLM] if language else [transformers.AutoModel]
    if not language and type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        kinds = [transformers.AutoModelForSeq2SeqLM, *kinds]
    elif not language and type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        kinds = [transformers.AutoModelForSpeechSeq2Seq, *kinds]
    for kind in kinds:
        answer: Any = kind.from_pretrained(place, output_loading_info=True, **options)
        loaded, found = answer
        if not found["missing_keys"]:
            break
    return loaded, set(found["missing_keys"])


def _check_goes_on(config: Any) -> None:
    """Refuse what does not go on with a text, word by word.

    Raises:
        ValueError: an encoder, an encoder–decoder, or a model that is of no language alone.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    causal = any(getattr(config, name, False) for name in ("is_decoder", "causal"))
    if getattr(config, "is_encoder_decoder", False):
        what = "makes one text of another"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "has no head that goes on with a text"
    elif both_ways and not causal:
        what = "reads both ways and fills in words"
    else:
        return
    raise ValueError(
        f"{config.model_type} {what}: a causal language model is needed here, such as GPT-2, Llama or Qwen"
    )


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
