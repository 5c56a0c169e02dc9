"""Linear-time and recurrent mixers, one mechanism a file: each in three forms, and as a layer with a state."""

from regard.mixers.linear._delta_rule import DeltaRule, delta_rule
from regard.mixers.linear._lightnet import MDLRPE, MDTPE, TPE, LightNet, lightnet
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._long_convolution import LongConvolution, long_convolution
from regard.mixers.linear._neural_memory import neural_memory
from regard.mixers.linear.adaptive_filter import AdaptiveFilterAttention, adaptive_filter_attention
from regard.mixers.linear.based import Based, TaylorAttention, taylor_attention, taylor_features
from regard.mixers.linear.chela import CHELA
from regard.mixers.linear.chunked_softmax import ChunkedSoftmaxAttention, chunked_attention
from regard.mixers.linear.dynamical_system import DynamicalSystem
from regard.mixers.linear.fast import FAST, fast_attention
from regard.mixers.linear.gated_delta_rule import GatedDeltaRule
from regard.mixers.linear.lightning import LightningAttention, lightning_attention, lightning_decay
from regard.mixers.linear.longvq import CodebookState, LongVQ, codebook_attention
from regard.mixers.linear.memory_choices import KL, Decay, Design, DotProduct, Huber, Lp, Lq, Memory
from regard.mixers.linear.miras import Memora, Miras, Moneta, Yaad
from regard.mixers.linear.mixer import Facts, Mixer, State
from regard.mixers.linear.selective_ssm import SelectiveSSM, selective_scan
from regard.mixers.linear.sliding_window import SlidingWindow, WindowState, sliding_window_attention
from regard.mixers.linear.softmax import SoftmaxAttention
from regard.mixers.linear.titans import LongTermMemory, MemoryAsContext, MemoryAsGate, MemoryAsLayer

__all__ = [
    "CHELA",
    "FAST",
    "KL",
    "MDLRPE",
    "MDTPE",
    "TPE",
    "AdaptiveFilterAttention",
    "Based",
    "ChunkedSoftmaxAttention",
    "CodebookState",
    "Decay",
    "DeltaRule",
    "Design",
    "DotProduct",
    "DynamicalSystem",
    "Facts",
    "GatedDeltaRule",
    "Huber",
    "LightNet",
    "LightningAttention",
    "LongConvolution",
    "LongTermMemory",
    "LongVQ",
    "Lp",
    "Lq",
    "Memora",
    "Memory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "Miras",
    "Mixer",
    "Moneta",
    "SelectiveSSM",
    "SlidingWindow",
    "SoftmaxAttention",
    "State",
    "TaylorAttention",
    "WindowState",
    "Yaad",
    "adaptive_filter_attention",
    "chunked_attention",
    "codebook_attention",
    "delta_rule",
    "fast_attention",
    "lightnet",
    "lightning_attention",
    "lightning_decay",
    "linear_attention",
    "long_convolution",
    "neural_memory",
    "selective_scan",
    "sliding_window_attention",
    "taylor_attention",
    "taylor_features",
]
