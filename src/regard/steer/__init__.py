"""Edits of attention, and the block in which they hold."""

from regard.steer.add import AddToKey, AddToQuery
from regard.steer.bias import Bias
from regard.steer.block import Block
from regard.steer.custom import Custom
from regard.steer.edit import Edit
from regard.steer.gate import Gate
from regard.steer.mutual import Mutual, capture
from regard.steer.recipe import load_recipe, parse_edit, save_recipe
from regard.steer.redistribute import Redistribute
from regard.steer.replace_map import ReplaceMap
from regard.steer.reweight import Reweight
from regard.steer.steer import steer
from regard.steer.temperature import Temperature

__all__ = [
    "AddToKey",
    "AddToQuery",
    "Bias",
    "Block",
    "Custom",
    "Edit",
    "Gate",
    "Mutual",
    "Redistribute",
    "ReplaceMap",
    "Reweight",
    "Temperature",
    "capture",
    "load_recipe",
    "parse_edit",
    "save_recipe",
    "steer",
]
