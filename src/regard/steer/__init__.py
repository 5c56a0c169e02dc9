"""Edits of attention, the block in which they hold, and what each head does to a metric."""

from regard._callable import make_callable
from regard.steer._capture import Captured, capture
from regard.steer._steer import steer
from regard.steer._sweep import sweep
from regard.steer.add import AddToKey, AddToOutput, AddToQuery, AddToValue
from regard.steer.bias import Bias
from regard.steer.block import Block
from regard.steer.custom import Custom
from regard.steer.edit import Edit
from regard.steer.gate import Gate
from regard.steer.metrics import log_probability, logit_difference
from regard.steer.mutual import Mutual
from regard.steer.patch_map import PatchMap
from regard.steer.patch_output import PatchOutput
from regard.steer.recipe import load_recipe, parse_edit, save_recipe
from regard.steer.redistribute import Redistribute
from regard.steer.replace_map import ReplaceMap
from regard.steer.restrict import Restrict
from regard.steer.reweight import Reweight
from regard.steer.sweep_result import SweepResult
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
    "Restrict",
    "Reweight",
    "SweepResult",
    "Temperature",
    "capture",
    "load_recipe",
    "log_probability",
    "logit_difference",
    "parse_edit",
    "save_recipe",
    "steer",
    "sweep",
]

make_callable(__name__, steer)
