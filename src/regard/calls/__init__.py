"""AttentionCall, and how calls are found in a model."""

from regard.calls.call import AttentionCall, Column, Factor
from regard.calls.enter import enter_all
from regard.calls.positions import Positions, Where, selected
from regard.calls.run import edited_map
from regard.calls.seam import Editor, Listener, Reading, edit_calls, keep, listen, show, unseen, watched
from regard.calls.selection import Heads, Layers, Selection
from regard.calls.text import Text
from regard.calls.tracker import Tracker

__all__ = [
    "AttentionCall",
    "Column",
    "Editor",
    "Factor",
    "Heads",
    "Layers",
    "Listener",
    "Positions",
    "Reading",
    "Selection",
    "Text",
    "Tracker",
    "Where",
    "edit_calls",
    "edited_map",
    "enter_all",
    "keep",
    "listen",
    "selected",
    "show",
    "unseen",
    "watched",
]
