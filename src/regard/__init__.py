"""Run attention, see it, steer it: attention matrices that are never stored, in any PyTorch model."""

from regard import cache, mixers, tokens
from regard.cache import compress
from regard.maps import AttentionMap
from regard.mini import mini
from regard.runtime import AttentionCall
from regard.steer import (
    AddToKey,
    AddToQuery,
    Bias,
    Block,
    Custom,
    Edit,
    Gate,
    Mutual,
    Redistribute,
    ReplaceMap,
    Reweight,
    Temperature,
    capture,
    load_recipe,
    parse_edit,
    save_recipe,
    steer,
)
from regard.tokens import Grid, locate
from regard.watch import (
    At,
    Entropy,
    Mass,
    MeanDistance,
    Pooled,
    Received,
    Recording,
    Rows,
    Sinks,
    Statistic,
    TopK,
    ValueNorm,
    load,
    watch,
)

__version__ = "0.1.0"

__all__ = [
    "AddToKey",
    "AddToQuery",
    "At",
    "AttentionCall",
    "AttentionMap",
    "Bias",
    "Block",
    "Custom",
    "Edit",
    "Entropy",
    "Gate",
    "Grid",
    "Mass",
    "MeanDistance",
    "Mutual",
    "Pooled",
    "Received",
    "Recording",
    "Redistribute",
    "ReplaceMap",
    "Reweight",
    "Rows",
    "Sinks",
    "Statistic",
    "Temperature",
    "TopK",
    "ValueNorm",
    "cache",
    "capture",
    "compress",
    "load",
    "load_recipe",
    "locate",
    "mini",
    "mixers",
    "parse_edit",
    "save_recipe",
    "steer",
    "tokens",
    "watch",
]
