"""Linear-time and recurrent mixers, one mechanism a file: each in three forms, and as a layer with a state."""

from regard.mixers.linear.delta_rule import DeltaRule, delta_rule
from regard.mixers.linear.gated_delta_rule import GatedDeltaRule
from regard.mixers.linear.linear_attention import linear_attention
from regard.mixers.linear.mixer import Facts, Mixer, State

__all__ = ["DeltaRule", "Facts", "GatedDeltaRule", "Mixer", "State", "delta_rule", "linear_attention"]
