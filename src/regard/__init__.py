"""Run attention, see it, steer it: attention matrices that are never stored, in any PyTorch model."""

from regard.calls import AttentionCall
from regard.maps import AttentionMap
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
    "At",
    "AttentionCall",
    "AttentionMap",
    "Entropy",
    "Mass",
    "MeanDistance",
    "Pooled",
    "Received",
    "Recording",
    "Rows",
    "Sinks",
    "Statistic",
    "TopK",
    "ValueNorm",
    "load",
    "watch",
]
