"""What policies keep of a text, against what the presses of kvpress keep of it: ``make_kvpress.py`` wrote that down."""

import json
from typing import Any

import pytest
import torch
from torch.nn import Module

import regard
from regard.cache import (
    TOVA,
    Adaptive,
    AfterPrompt,
    ByLayer,
    ChunkKV,
    CriticalKV,
    Every,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    ObservedAttention,
    Policy,
    QFilters,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
)
from tests.goldens.make_kvpress import FILE, FILTERS, PROMPT, STREAMING

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))
RETRIEVAL = {layer: [head for head in range(4) if head not in STREAMING.get(layer, ())] for layer in range(4)}
SAFEGUARD = {"floor": 0.0, "safeguard": 0.2}  # Ada-KV as kvpress has it

# With as many entries as a press is left with by its ratio. TOVA's press keeps the last token in any case, as the method does
# not; of these ids both keep it.
READING: dict[str, Policy] = {
    "Knorm": Knorm(budget=32),
    "SnapKV, window 16, kernel 5": SnapKV(budget=32, window=16, kernel=5),
    "SnapKV, window 8, kernel 7": SnapKV(budget=64, window=8, kernel=7),
    "TOVA": TOVA(budget=32, when=AfterPrompt()),
    "StreamingLLM": StreamingLLM(budget=32, sinks=4, when=AfterPrompt()),
    "ObservedAttention": ObservedAttention(budget=64, recent=0.0, average=True, when=AfterPrompt()),
    # The press has its ramp over the whole budget; the authors, as here, beyond the window.
    "PyramidKV": SnapKV(budget=ByLayer(60, [117 / 60, 79 / 60, 41 / 60, 3 / 60]), window=2, kernel=5),
    "AdaKV of Knorm": Knorm(budget=Adaptive(40, **SAFEGUARD)),
    "AdaKV of SnapKV": SnapKV(budget=Adaptive(40, **SAFEGUARD), window=8, kernel=5),
    "ExpectedAttention": ExpectedAttention(budget=32),
    "ExpectedAttention, mean alone": ExpectedAttention(budget=32, covariance=False, values=False, sinks=2),
    "Q-Filters": QFilters(budget=32, filters=FILTERS),
    "KeyDiff": KeyDiff(budget=32),
    "ChunkKV of Knorm": ChunkKV(Knorm(budget=64), length=20),
    "CriticalKV of SnapKV": CriticalKV(SnapKV(budget=32, window=16, kernel=5)),
    "CriticalKV of ExpectedAttention": CriticalKV(ExpectedAttention(budget=32, values=False)),
    "CriticalAdaKV of SnapKV": CriticalKV(SnapKV(budget=Adaptive(40, **SAFEGUARD), window=8, kernel=5)),
    "DuoAttention": RetrievalHeads(budget=20, sinks=3, heads=RETRIEVAL, when=AfterPrompt()),
}
DECODING: dict[str, Policy] = {
    "Knorm while decoding": Knorm(budget=60, when=Every(4, prompt=False)),
    "TOVA while decoding": TOVA(budget=60, when=Every(4, prompt=False)),
}


def kept_by(model: Module, policy: Policy, tokens: int) -> list[list[list[int]]]:
    """The positions that are left of so many tokens, those after the prompt read one by one, by layer and key head."""
    ids = torch.tensor([GOLDEN["ids"][:tokens]])
    with torch.no_grad(), regard.compress(model, policy) as cache:
        past = model(ids[:, :PROMPT]).past_key_values
        for place in range(PROMPT, tokens):
            model(ids[:, place : place + 1], past_key_values=past)
    return [[head.nonzero()[:, 0].tolist() for head in layer.positions[0]] for layer in cache.report().layers]


def test_every_press_is_tried() -> None:
    assert set(GOLDEN["kept"]) == {*READING, *DECODING}


@pytest.mark.parametrize("name", READING)
def test_of_a_prompt(mini: tuple[Module, Any], name: str) -> None:
    assert kept_by(mini[0], READING[name], PROMPT) == GOLDEN["kept"][name]


@pytest.mark.parametrize("name", DECODING)
def test_while_decoding(mini: tuple[Module, Any], name: str) -> None:
    assert kept_by(mini[0], DECODING[name], len(GOLDEN["ids"])) == GOLDEN["kept"][name]
