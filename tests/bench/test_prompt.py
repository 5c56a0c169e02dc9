"""What policies keep of a prompt that was read once is what they keep in a block of their own."""

from collections.abc import Callable

import pytest
import torch
from bench.prompt import Prompt
from torch import Tensor

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    ChunkKV,
    CriticalKV,
    ExpectedAttention,
    KeepAll,
    KeyDiff,
    Knorm,
    KVzip,
    Merge,
    ObservedAttention,
    Policy,
    Pyramid,
    QFilters,
    Quantise,
    Random,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
    ThinK,
)
from regard.cache.report import report

MODEL, TOKENIZER = regard.mini()
TEXT = "The code of Ada is 48213. They slept until the sun stood high above the hills. " * 6 + "The code of Ada is"
IDS = TOKENIZER(TEXT, return_tensors="pt")["input_ids"]

POLICIES: dict[str, Callable[[], Policy]] = {
    "everything": KeepAll,
    "random": lambda: Random(budget=0.25),
    "sinks and last": lambda: StreamingLLM(budget=0.25, when=AfterPrompt()),
    "norms": lambda: Knorm(budget=0.25),
    "directions": lambda: KeyDiff(budget=0.25),
    "filters": lambda: QFilters(budget=0.25, filters=QFilters.calibrate(MODEL, [IDS[0]])),
    "all attention": lambda: ObservedAttention(budget=0.25, when=AfterPrompt()),
    "last query": lambda: TOVA(budget=0.25, when=AfterPrompt()),
    "window": lambda: SnapKV(budget=0.25, window=8),
    "window by query head": lambda: SnapKV(budget=0.25, window=8, kernel=9, pooling="max"),
    "by head": lambda: SnapKV(budget=Adaptive(0.25), window=8),
    "by layer": lambda: SnapKV(budget=Pyramid(0.5), window=8),
    "output": lambda: CriticalKV(SnapKV(budget=Adaptive(0.25), window=8)),
    "chunks": lambda: ChunkKV(SnapKV(budget=0.25, window=8), reuse=2),
    "some heads": lambda: TaskKV(budget=0.5, sinks=2, recent=8, window=8),
    "queries to come": lambda: ExpectedAttention(budget=0.25),
    "heads": lambda: RetrievalHeads(budget=0.25, heads={1: [0]}, when=AfterPrompt()),
    "channels": lambda: ThinK(SnapKV(budget=0.25, window=8), window=8),
    "merged": lambda: SnapKV(budget=0.25, window=8, rest=Merge()),
    "few bits": lambda: StreamingLLM(budget=16, sinks=0, when=AfterPrompt(), rest=Quantise(bits=4)),
    "repetition": lambda: KVzip(TOKENIZER, budget=0.25),
    "repetition by layer": lambda: KVzip(TOKENIZER, budget=0.5, across="layer", chunk=64, normalized=True),
}


@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_what_is_kept_is_what_a_block_keeps(name: str) -> None:
    policy = POLICIES[name]()
    with regard.compress(MODEL, policy) as block:
        past = MODEL(IDS).past_key_values
    prompts = (Prompt(MODEL, IDS), Prompt(MODEL, IDS[:, 90:], Prompt(MODEL, IDS[:, :90])))
    for prompt in prompts:
        for _ in range(2):  # one policy leaves the prompt to others as it was
            cache = prompt.compressed(policy)
            found, expected = report(cache, str(policy), True), block.report()
            for own, other in zip(found.layers, expected.layers, strict=True):
                assert torch.equal(own.positions, other.positions)
                assert (own.kept, own.quantised) == (other.kept, other.quantised)
            torch.testing.assert_close(_next(cache), _next(past), rtol=1e-4, atol=1e-4)
            past.crop(-2)


def _next(past: object) -> Tensor:
    """What the model says after two further tokens."""
    logits: Tensor = MODEL(IDS[:, :2], past_key_values=past).logits
    return logits
