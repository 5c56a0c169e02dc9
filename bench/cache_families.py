"""Every policy that chooses among text, with the settings that are tried of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from typing import Any

from torch import Tensor

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
    QAdA,
    QFilters,
    Quantise,
    Quest,
    Random,
    RetrievalHeads,
    SnapKV,
    StreamingLLM,
    TaskKV,
    ThinK,
)

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
FULL = "full cache"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A policy by its budget and settings: those to be searched, the first of which are its usual ones."""

    make: Callable[..., Policy]
    settings: Sequence[Settings] = ({},)
    budgets: Sequence[float] = BUDGETS


@dataclass(eq=False)
class Reader:
    """A model with what policies need of it, found once."""

    model: Any
    tokenizer: Any
    samples: list[list[int]]

    @cached_property
    def filters(self) -> Tensor:
        """For `QFilters`."""
        return QFilters.calibrate(self.model, self.samples)

    @cache  # noqa: B019 - there is one reader
    def retrieval(self, share: float) -> dict[int, list[int]]:
        """The share of heads that look most at what is to be copied."""
        return RetrievalHeads.profile(self.model, self.samples, share)

    def retrieval_heads(self, budget: float, full: float) -> Policy:
        """This part of the budget for heads that keep all, and the rest shared by the others."""
        heads = self.model.config.num_hidden_layers * self.model.config.num_key_value_heads
        number = round(full * budget * heads)
        rest = (budget * heads - number) / (heads - number)
        found = self.retrieval(number / heads) if number else {}
        return RetrievalHeads(budget=rest, heads=found, when=AfterPrompt())


def grid(**values: Sequence[Any]) -> list[Settings]:
    """Every combination of some settings."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def families(reader: Reader) -> dict[str, Family]:
    """Every policy that stands by itself."""
    at_once = {"when": AfterPrompt()}
    return {
        "random": Family(Random),
        "StreamingLLM": Family(partial(StreamingLLM, **at_once), grid(sinks=(4, 1, 16))),
        "Knorm": Family(Knorm),
        "KeyDiff": Family(KeyDiff),
        "Q-Filters": Family(lambda budget: QFilters(budget=budget, filters=reader.filters)),
        "observed attention": Family(
            partial(ObservedAttention, **at_once), grid(recent=(0.5, 0.0), average=(False, True))
        ),
        "TOVA": Family(partial(TOVA, **at_once)),
        "SnapKV, usual": Family(SnapKV),
        "SnapKV": Family(SnapKV, grid(window=(32, 16, 8), kernel=(5, 9, 17, 33), pooling=("mean", "max"))),
        "Task-KV": Family(
            partial(TaskKV, sinks=4), grid(recent=(64, 16), kernel=(7, 17, 33))
        ),
        "ExpectedAttention": Family(
            ExpectedAttention, grid(future=(512, 64), values=(True, False))
        ),
        "KVzip": Family(
            partial(KVzip, reader.tokenizer, chunk=500), grid(across=("model", "layer", "head"))
        ),
        "KVzip+": Family(partial(KVzip, reader.tokenizer, chunk=500, normalized=True)),
        "retrieval heads": Family(
            lambda budget, full: reader.retrieval_heads(budget, full), grid(full=(0.75, 0.5, 0.9))
        ),
    }  # fmt: skip


def families_around(best: Mapping[str, Settings]) -> dict[str, Family]:
    """Those around another policy, or with another budget or rest, by its best settings."""
    snap, expected = partial(SnapKV, **best["SnapKV"]), partial(ExpectedAttention, **best["ExpectedAttention"])
    shares = grid(floor=(0.2, 0.0, 0.5))
    return {
        "SnapKV, by head": Family(lambda budget, floor: snap(budget=Adaptive(budget, floor)), shares),
        "SnapKV, pyramid": Family(lambda budget, beta: snap(budget=Pyramid(budget, beta)), grid(beta=(20, 2))),
        "SnapKV, rest merged": Family(partial(snap, rest=Merge()), budgets=(1 / 4, 1 / 16)),
        "CriticalKV of SnapKV": Family(
            lambda budget, first: CriticalKV(snap(budget=Adaptive(budget)), first=first), grid(first=(0.5, 0.25))
        ),
        "ChunkKV of SnapKV": Family(
            lambda budget, length: ChunkKV(snap(budget=budget), length=length), grid(length=(10, 5, 20))
        ),
        "ThinK of SnapKV": Family(lambda budget: ThinK(snap(budget=budget))),
        "ExpectedAttention, by head": Family(lambda budget, floor: expected(budget=Adaptive(budget, floor)), shares),
    }


def families_whole() -> dict[str, Family]:
    """Those that keep every entry: with few bits, or in part unread by each step."""
    last = partial(StreamingLLM, 64, sinks=0, when=AfterPrompt())
    return {
        FULL: Family(lambda budget: KeepAll(), budgets=(1.0,)),
        "8 bits": Family(lambda budget: last(rest=Quantise(bits=8)), budgets=(1.0,)),
        "4 bits": Family(lambda budget: last(rest=Quantise(bits=4)), budgets=(1.0,)),
        "Quest": Family(Quest, budgets=(1 / 4, 1 / 16)),
        "QAdA": Family(lambda budget: QAdA(threshold=budget, recent=256), budgets=(0.9,)),
    }
