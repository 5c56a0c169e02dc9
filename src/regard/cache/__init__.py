"""Key–value cache policies, one file each, and `compress`, which has them work in ``generate``."""

from regard.cache.compress import compress
from regard.cache.controls import KeepAll, Random
from regard.cache.knorm import Knorm
from regard.cache.observed_attention import ObservedAttention
from regard.cache.policy import Entries, Policy
from regard.cache.report import LayerReport, Report
from regard.cache.snapkv import SnapKV
from regard.cache.streaming_llm import StreamingLLM
from regard.cache.tova import TOVA

__all__ = [
    "TOVA",
    "Entries",
    "KeepAll",
    "Knorm",
    "LayerReport",
    "ObservedAttention",
    "Policy",
    "Random",
    "Report",
    "SnapKV",
    "StreamingLLM",
    "compress",
]
