"""A text given to a language model, and what it writes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode(model: Any, tokenizer: Any, text: str, tokens: int) -> dict[str, Tensor]:
    """What the model reads, (1, tokens), where as many ``tokens`` more are to be written.

    Raises:
        ValueError: an empty text; one longer than the model's positions.
    """
    if not text.strip():
        raise ValueError("the text is empty")
    encoded = tokenizer(text, return_tensors="pt", verbose=False)
    read, limit = encoded["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if limit is not None and read + tokens > limit:
        raise ValueError(
            f"the text has {read:,} tokens, and {tokens} are to be written, but the model has positions for {limit:,}"
        )
    device = next(model.parameters()).device
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def complete(model: Any, tokenizer: Any, inputs: dict[str, Tensor], tokens: int) -> str:
    """The text of that many tokens that the model writes, greedily."""
    if not tokens:
        return ""
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
