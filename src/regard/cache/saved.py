"""Compressed caches in files."""

from __future__ import annotations

from os import PathLike
from typing import IO, Any

import torch


def save(cache: Any, file: str | PathLike[str] | IO[bytes]) -> None:
    """Save a cache that was compressed, ``past_key_values`` of a model, to go on with it elsewhere.

    Raises:
        TypeError: anything but a cache.

    >>> import io, torch, regard
    >>> model, tokenizer = regard.mini()
    >>> inputs, file = tokenizer("The code of Ada is 48213. They slept.", return_tensors="pt"), io.BytesIO()
    >>> with torch.no_grad(), regard.compress(model, regard.cache.Knorm(budget=0.5)):
    ...     regard.cache.save(model(**inputs).past_key_values, file)
    >>> _ = file.seek(0)
    >>> asked = tokenizer("The code of Ada is 48213. They slept. The", return_tensors="pt")
    >>> written = model.generate(**asked, past_key_values=regard.cache.load(file), max_new_tokens=3, do_sample=False)
    """
    from transformers.cache_utils import Cache

    if not isinstance(cache, Cache):
        raise TypeError(f"save takes a cache, such as model(…).past_key_values, got {type(cache).__name__}")
    torch.save(cache, file)


def load(file: str | PathLike[str] | IO[bytes], device: torch.device | str | None = None) -> Any:
    """Load a cache that `save` saved; nothing but what a cache consists of is made from the file.

    Args:
        file: where it is.
        device: where its keys and values are to be; by default where they were.
    """
    import transformers.cache_utils as caches

    from regard.cache.head_group import HeadGroup
    from regard.cache.layer import KeptLayer
    from regard.cache.narrow_group import NarrowGroup
    from regard.cache.open_block import OpenBlock
    from regard.cache.packed import Packed, PackedEntries
    from regard.cache.window import Window

    names = ("Cache", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
    known = [getattr(caches, name) for name in names if hasattr(caches, name)]
    own = [KeptLayer, HeadGroup, NarrowGroup, OpenBlock, Packed, PackedEntries, Window]
    with torch.serialization.safe_globals([*known, *own]):
        return torch.load(file, map_location=device, weights_only=True)
