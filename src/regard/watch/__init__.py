"""Statistics, one file each, and the recording that they fill."""

from regard._callable import make_callable
from regard.watch._watch import watch
from regard.watch.at import At
from regard.watch.entropy import Entropy
from regard.watch.grid_distance import GridDistance
from regard.watch.mass import Mass
from regard.watch.mean_distance import MeanDistance
from regard.watch.pooled import Pooled
from regard.watch.received import Received
from regard.watch.recording import Recording, load, save, with_tokens
from regard.watch.rows import Rows
from regard.watch.sinks import Sinks
from regard.watch.statistic import Statistic
from regard.watch.topk import TopK
from regard.watch.value_norm import ValueNorm

__all__ = [
    "At",
    "Entropy",
    "GridDistance",
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
    "save",
    "watch",
    "with_tokens",
]

make_callable(__name__, watch)
