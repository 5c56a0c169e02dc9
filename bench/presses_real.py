"""What `bench.cache_real` measures, with presses of kvpress: run by an interpreter that has it, as `bench.presses` is.

    PYTHON -m bench.presses_real MODEL DTYPE THREADS      reads requests, a line of JSON each, and answers each with another

A request has the ``name`` of a press, the ``budget`` that it keeps, the ``ids`` of a text and the ``rows`` that are read
after it, none of which sees another; the answer has the first ``choices`` after each token of each row, and the ``losses``
of its next tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from bench.presses import presses
from bench.reading import read_apart


def answer(model: Any, made: dict[str, Callable[[float], Any]], request: dict[str, Any]) -> dict[str, Any]:
    """What the model says after a text that a press has compressed."""
    model.set_attn_implementation("eager" if request["name"] == "observed attention" else "sdpa")
    ids, rows, cache = torch.tensor([request["ids"]]), request["rows"], DynamicCache(config=model.config)
    with torch.inference_mode():
        with made[request["name"]](1 - request["budget"])(model):
            model(ids, past_key_values=cache, logits_to_keep=1)
        model.set_attn_implementation("sdpa")
        logits = read_apart(model, cache, rows, start=ids.shape[1])
    losses = [
        functional.cross_entropy(one[:-1].float(), torch.tensor(row[1:])) for one, row in zip(logits, rows, strict=True)
    ]
    return {"choices": [one.argmax(dim=-1).tolist() for one in logits], "losses": [float(loss) for loss in losses]}


def main() -> None:
    from importlib.metadata import version

    model, dtype, threads = sys.argv[1:]
    made = presses()
    torch.set_num_threads(int(threads))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded.config.name_or_path = model  # by which presses find its tokenizer
    print(json.dumps({"kvpress": version("kvpress"), "transformers": version("transformers")}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(loaded, made, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
