"""Mixers whose state is a matrix or a filter: linear attention, delta rules, state spaces, in three forms and as a layer."""

from regard.mixers.linear._delta_rule import DeltaRule, delta_rule
from regard.mixers.linear._lightnet import MDLRPE, MDTPE, TPE, LightNet, lightnet
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._long_convolution import LongConvolution, long_convolution
from regard.mixers.linear.based import Based, TaylorAttention, taylor_attention, taylor_features
from regard.mixers.linear.chela import CHELA
from regard.mixers.linear.fast import FAST, fast_attention
from regard.mixers.linear.gated_delta_rule import GatedDeltaRule
from regard.mixers.linear.gated_linear_attention import GatedLinearAttention
from regard.mixers.linear.lightning import LightningAttention, lightning_attention, lightning_decay
from regard.mixers.linear.longvq import CodebookState, LongVQ, codebook_attention
from regard.mixers.linear.selective_ssm import SelectiveSSM, selective_scan

__all__ = [
    "CHELA",
    "FAST",
    "MDLRPE",
    "MDTPE",
    "TPE",
    "Based",
    "CodebookState",
    "DeltaRule",
    "GatedDeltaRule",
    "GatedLinearAttention",
    "LightNet",
    "LightningAttention",
    "LongConvolution",
    "LongVQ",
    "SelectiveSSM",
    "TaylorAttention",
    "codebook_attention",
    "delta_rule",
    "fast_attention",
    "lightnet",
    "lightning_attention",
    "lightning_decay",
    "linear_attention",
    "long_convolution",
    "selective_scan",
    "taylor_attention",
    "taylor_features",
]
