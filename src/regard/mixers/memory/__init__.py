"""Mixers that remember in the weights of a network, which learns while it reads: Titans and Miras."""

from regard.mixers.memory._neural_memory import neural_memory
from regard.mixers.memory.choices import KL, Decay, Design, DotProduct, Huber, Lp, Lq, Memory
from regard.mixers.memory.miras import Memora, Miras, Moneta, Yaad
from regard.mixers.memory.titans import LongTermMemory, MemoryAsContext, MemoryAsGate, MemoryAsLayer

__all__ = [
    "KL",
    "Decay",
    "Design",
    "DotProduct",
    "Huber",
    "LongTermMemory",
    "Lp",
    "Lq",
    "Memora",
    "Memory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "Miras",
    "Moneta",
    "Yaad",
    "neural_memory",
]
