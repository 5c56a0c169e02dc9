"""Key–value cache policies, one file each, and `compress`, which has them work in ``generate``."""

from regard.cache._compress import compress
from regard.cache.budget import BudgetPolicy, HeadBudgetPolicy
from regard.cache.controls import KeepAll, Random
from regard.cache.flowcut import FlowCut
from regard.cache.image_rank import ImageRank
from regard.cache.knorm import Knorm
from regard.cache.observed_attention import ObservedAttention
from regard.cache.policy import Entries, Policy, Step
from regard.cache.qada import QAdA
from regard.cache.report import LayerReport, Report
from regard.cache.retrieval_heads import RetrievalHeads
from regard.cache.snapkv import SnapKV
from regard.cache.streaming_llm import StreamingLLM
from regard.cache.task_kv import TaskKV
from regard.cache.tova import TOVA

__all__ = [
    "TOVA",
    "BudgetPolicy",
    "Entries",
    "FlowCut",
    "HeadBudgetPolicy",
    "ImageRank",
    "KeepAll",
    "Knorm",
    "LayerReport",
    "ObservedAttention",
    "Policy",
    "QAdA",
    "Random",
    "Report",
    "RetrievalHeads",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "TaskKV",
    "compress",
]
