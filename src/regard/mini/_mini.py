"""A small causal language model with really trained weights, offline: ``regard.mini()``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

_FOLDER = Path(__file__).parent / "model"
_CHECKSUMS = "checksums.json"


name = "regard-mini"


def mini(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Module, Any]:
    """The bundled model, an ordinary Llama of transformers, and its fast tokenizer.

    It has 4 layers of 8 query and 4 key/value heads, and reads 1,024 tokens. It was trained on books in the public domain and
    on tasks that make attention look back: passages that come again, facts that are asked for later, lists of keys and
    values. ``README.md`` in its folder, the model card, says what it can do, with figures.

    Args:
        device: where to put it.
        dtype: of its parameters, which are stored as float16.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: a file of the model is missing.
        ValueError: a file of the model is not what was shipped.

    Example:
        >>> import regard, torch
        >>> model, tokenizer = regard.mini()
        >>> text = "The secret number of Ada is 48213. It rained all day. The secret number of Ada is"
        >>> told = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        >>> tokenizer.decode(told[0, -5:])
        '48213'
    """
    folder = path()
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError('regard.mini() needs transformers: pip install "regard[hf]"') from error
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder)


def path() -> Path:
    """The folder of the bundled model's weights and tokenizer, for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: a file of the model is not what was shipped.

    Example:
        >>> import regard
        >>> (regard.mini.path() / "model.safetensors").exists()
        True
    """
    check(_FOLDER)
    return _FOLDER


def check(folder: Path) -> None:
    """Compare the files of a model with the SHA-256 sums in its ``checksums.json``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    again = "install regard again: pip install --force-reinstall --no-deps regard"
    sums = folder / _CHECKSUMS
    try:
        expected: dict[str, str] = json.loads(sums.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the bundled model is not complete: {sums} is missing; {again}") from error
    except ValueError as error:
        raise ValueError(f"the bundled model is damaged: {sums} is not JSON ({error}); {again}") from error
    for name, digest in expected.items():
        path = folder / name
        if not path.exists():
            raise FileNotFoundError(f"the bundled model is not complete: {path} is missing; {again}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            size = f"{len(content):,} bytes"
            raise ValueError(f"the bundled model is damaged: {path} ({size}) is not the file that was shipped; {again}")
