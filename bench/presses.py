"""What `bench.cache` measures, as far as it needs no regard: run by an interpreter that has kvpress, it measures its presses.

    PYTHON -m bench.presses      reads requests, a line of JSON each, and answers each with another

kvpress wants an older transformers than regard does, so that no environment has both: the two are measured in two processes,
in turn.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.measuring import clock

STEPS = 12
Block = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Cost:
    """Seconds of reading a text and of a step of decoding after it, and bytes of keys and values then."""

    reading: float
    step: float
    held: int


def llama(device: str, tokenizer: str = "") -> LlamaForCausalLM:
    """Random weights; ``tokenizer`` is the folder of one whose ids it knows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        vocab_size=8192, max_position_embeddings=32768, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device)
    model.config.name_or_path = tokenizer
    return model


def tokens(length: int, device: str) -> Tensor:
    """A text of so many tokens."""
    return torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(length)).to(device)


def cost(model: Any, ids: Tensor, device: str, block: Block, held: Callable[[Any], int], steps_inside: bool) -> Cost:
    """Of one text, and of steps after it, inside the block in which it was read or outside."""
    cache, token = DynamicCache(config=model.config), ids[:, :1]

    def read() -> None:
        with block():
            model(ids, past_key_values=cache, logits_to_keep=1)

    def step(number: int) -> float:
        place = torch.tensor([[ids.shape[1] + number]], device=ids.device)
        return clock(lambda: model(token, past_key_values=cache, position_ids=place), device)

    with torch.inference_mode():
        if not steps_inside:
            reading = clock(read, device)
            return Cost(reading, statistics.median(map(step, range(STEPS))), held(cache))
        with block():
            reading = clock(lambda: model(ids, past_key_values=cache, logits_to_keep=1), device)
            return Cost(reading, statistics.median(map(step, range(STEPS))), held(cache))


def plain_bytes(cache: Any) -> int:
    """Of a cache of transformers."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def presses() -> dict[str, Callable[[float], Any]]:
    """Of what share to drop, by the names that `bench.cache` has for the policies of regard."""
    import kvpress

    snap = partial(kvpress.SnapKVPress, window_size=32, kernel_size=5)
    return {
        "Knorm": kvpress.KnormPress,
        "SnapKV": snap,
        "SnapKV, by head": lambda gone: kvpress.AdaKVPress(snap(gone)),
        "ExpectedAttention": kvpress.ExpectedAttentionPress,
        "KVzip": kvpress.KVzipPress,
        "TOVA": kvpress.TOVAPress,
        "StreamingLLM": partial(kvpress.StreamingLLMPress, n_sink=4),
        "observed attention": kvpress.ObservedAttentionPress,
        "SnapKV, ThinK": lambda gone: kvpress.ComposedPress([snap(gone), kvpress.ThinKPress(0.5)]),
    }


def answer(model: Any, made: dict[str, Callable[[float], Any]], name: str, length: int, device: str) -> Cost:
    """What a press costs, or with no name the model alone."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # of the text before
    if name and name not in made:
        raise ValueError(f"kvpress has no press for {name!r}")
    model.set_attn_implementation("eager" if name == "observed attention" else "sdpa")
    press = made[name](0.75) if name else None
    block: Block = nullcontext if press is None else lambda: press(model)
    return cost(model, tokens(length, device), device, block, plain_bytes, steps_inside=False)


def main() -> None:
    from importlib.metadata import version

    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = presses()
    torch.set_num_threads(int(sys.argv[2]))
    model = llama(device, sys.argv[1])
    print(json.dumps({"kvpress": version("kvpress"), "transformers": version("transformers")}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(asdict(answer(model, made, request["name"], request["length"], device))), flush=True)


if __name__ == "__main__":
    main()
