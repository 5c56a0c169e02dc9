"""Edits of attention, and the block in which they hold."""

from regard._callable import make_callable
from regard.steer._steer import steer
from regard.steer.add import AddToKey, AddToOutput, AddToQuery, AddToValue
from regard.steer.bias import Bias
from regard.steer.block import Block
from regard.steer._capture import Captured, capture
from regard.steer.custom import Custom
from regard.steer.edit import Edit
from regard.steer.gate import Gate
from regard.steer.mutual import Mutual
from regard.steer.patch_map import PatchMap
from regard.steer.patch_output import PatchOutput
from regard.steer.recipe import load_recipe, parse_edit, save_recipe
from regard.steer.redistribute import Redistribute
from regard.steer.replace_map import ReplaceMap
from regard.steer.reweight import Reweight
from regard.steer.temperature import Temperature

__all__ = [
    "AddToKey",
    "AddToOutput",
    "AddToQuery",
    "AddToValue",
    "Bias",
    "Block",
    "Captured",
    "Custom",
    "Edit",
    "Gate",
    "Mutual",
    "PatchMap",
    "PatchOutput",
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

make_callable(__name__, steer)
