"""How calls of attention are found in a model, where they stand, and the chain of blocks that they go through."""

from regard.runtime.attention import attend, edited_map, read, run, stored
from regard.runtime.call import AttentionCall, Call, Column, Factor, HiddenCall, Place, visible
from regard.runtime.chain import Block, Proceed, intercept, interceptors, looked_at, unseen
from regard.runtime.entry import Entry, Reentrant
from regard.runtime.reading import Reading
from regard.runtime.seams import entered
from regard.runtime.stack import Stack
from regard.runtime.text import Text
from regard.runtime.tracker import Site, Tracker
from regard.runtime.unseen_model import explain

__all__ = [
    "AttentionCall",
    "Block",
    "Call",
    "Column",
    "Entry",
    "Factor",
    "HiddenCall",
    "Place",
    "Proceed",
    "Reading",
    "Reentrant",
    "Site",
    "Stack",
    "Text",
    "Tracker",
    "attend",
    "edited_map",
    "entered",
    "explain",
    "intercept",
    "interceptors",
    "looked_at",
    "read",
    "run",
    "stored",
    "unseen",
    "visible",
]
