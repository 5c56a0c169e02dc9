"""How calls of attention are found in a model, where they stand, and the chain of blocks that they go through."""

from regard.runtime.attention import attend, edited_map, read, run
from regard.runtime.call import AttentionCall, Call, Column, Factor, HiddenCall, Place, unpacked
from regard.runtime.chain import Block, Proceed, intercept, interceptors, looked_at, unseen
from regard.runtime.positions import Positions, Where, selected
from regard.runtime.reading import Reading
from regard.runtime.seams import entered
from regard.runtime.selection import Heads, Layers, Selection
from regard.runtime.text import Text
from regard.runtime.tracker import Site, Tracker
from regard.runtime.unseen_model import explain

__all__ = [
    "AttentionCall",
    "Block",
    "Call",
    "Column",
    "Factor",
    "Heads",
    "HiddenCall",
    "Layers",
    "Place",
    "Positions",
    "Proceed",
    "Reading",
    "Selection",
    "Site",
    "Text",
    "Tracker",
    "Where",
    "attend",
    "edited_map",
    "entered",
    "intercept",
    "explain",
    "interceptors",
    "looked_at",
    "read",
    "run",
    "selected",
    "unpacked",
    "unseen",
]
