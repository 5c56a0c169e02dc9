"""Key–value cache policies, one file each, and `compress`, which has them work in ``generate``."""

from regard.cache._compress import compress
from regard.cache.adaptive import Adaptive
from regard.cache.budget import Budget, Uniform
from regard.cache.budget_policy import BudgetPolicy
from regard.cache.by_layer import ByLayer
from regard.cache.cam import CaM
from regard.cache.chunkkv import ChunkKV
from regard.cache.controls import KeepAll, Random
from regard.cache.criticalkv import CriticalKV
from regard.cache.expected_attention import ExpectedAttention
from regard.cache.flowcut import FlowCut
from regard.cache.image_rank import ImageRank
from regard.cache.keydiff import KeyDiff
from regard.cache.knorm import Knorm
from regard.cache.merge import Merge
from regard.cache.module_call import ModuleCall
from regard.cache.observed_attention import ObservedAttention
from regard.cache.policy import Entries, Policy, Reads, Step
from regard.cache.pyramid import Pyramid
from regard.cache.q_filters import QFilters
from regard.cache.qada import QAdA
from regard.cache.report import LayerReport, Report
from regard.cache.rest import Drop, Rest
from regard.cache.retrieval_heads import RetrievalHeads
from regard.cache.saved import load, save
from regard.cache.snapkv import SnapKV
from regard.cache.streaming_llm import StreamingLLM
from regard.cache.task_kv import TaskKV
from regard.cache.tova import TOVA
from regard.cache.unread import Unread
from regard.cache.when import AfterPrompt, Every, Never, When

__all__ = [
    "TOVA",
    "Adaptive",
    "AfterPrompt",
    "Budget",
    "BudgetPolicy",
    "ByLayer",
    "CaM",
    "ChunkKV",
    "CriticalKV",
    "Drop",
    "Entries",
    "Every",
    "ExpectedAttention",
    "FlowCut",
    "ImageRank",
    "KeepAll",
    "KeyDiff",
    "Knorm",
    "LayerReport",
    "Merge",
    "ModuleCall",
    "Never",
    "ObservedAttention",
    "Policy",
    "Pyramid",
    "QAdA",
    "QFilters",
    "Random",
    "Reads",
    "Report",
    "Rest",
    "RetrievalHeads",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "TaskKV",
    "Uniform",
    "Unread",
    "When",
    "compress",
    "load",
    "save",
]
