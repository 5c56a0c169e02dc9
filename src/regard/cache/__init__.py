"""Key–value cache policies, one file each, and `compress`, which has them work in ``generate``."""

from regard.cache._compress import compress
from regard.cache.budget import BudgetPolicy, HeadBudgetPolicy
from regard.cache.cam import CaM
from regard.cache.chunkkv import ChunkKV
from regard.cache.controls import KeepAll, Random
from regard.cache.criticalkv import CriticalKV
from regard.cache.expected_attention import ExpectedAttention
from regard.cache.flowcut import FlowCut
from regard.cache.image_rank import ImageRank
from regard.cache.keydiff import KeyDiff
from regard.cache.knorm import Knorm
from regard.cache.kvzip import KVzip
from regard.cache.module_call import ModuleCall
from regard.cache.observed_attention import ObservedAttention
from regard.cache.policy import Entries, Policy, Step
from regard.cache.q_filters import QFilters
from regard.cache.qada import QAdA
from regard.cache.report import LayerReport, Report
from regard.cache.retrieval_heads import RetrievalHeads
from regard.cache.saved import load, save
from regard.cache.snapkv import SnapKV
from regard.cache.streaming_llm import StreamingLLM
from regard.cache.task_kv import TaskKV
from regard.cache.tova import TOVA

__all__ = [
    "TOVA",
    "BudgetPolicy",
    "CaM",
    "ChunkKV",
    "CriticalKV",
    "Entries",
    "ExpectedAttention",
    "FlowCut",
    "HeadBudgetPolicy",
    "ImageRank",
    "KVzip",
    "KeepAll",
    "KeyDiff",
    "Knorm",
    "LayerReport",
    "ModuleCall",
    "ObservedAttention",
    "Policy",
    "QAdA",
    "QFilters",
    "Random",
    "Report",
    "RetrievalHeads",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "TaskKV",
    "compress",
    "load",
    "save",
]
