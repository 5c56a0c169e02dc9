"""Published methods for language models, each a few lines on the edits; one file for each."""

from regard.steer.language._act import CalibrateSinks, act, find_act_heads, find_sinks
from regard.steer.language._juice import (
    JuiceHeads,
    JustRunTwice,
    calibrate_juice,
    find_juice_heads,
    generate_twice,
    juice,
    run_twice,
)
from regard.steer.language._pasta import pasta, score_pasta_heads
from regard.steer.language._zero_tuning import (
    ZeroTuning,
    ZeroTuningProfile,
    calibrate_zero_tuning,
    profile_zero_tuning,
    zero_tuning,
)
from regard.steer.language.context_heads import context_share, steer_to_context
from regard.steer.language.example import Example, accuracy, answer_probability, confidence
from regard.steer.language.focus_directions import FocusDirections, learn_focus_directions
from regard.steer.language.heads import best_heads
from regard.steer.language.opera import OverTrustPenalty, generate_with_rollback
from regard.steer.language.soft_injection import InjectTask, SoftInjection, learn_soft_injection, task_embedding

__all__ = [
    "CalibrateSinks",
    "Example",
    "FocusDirections",
    "InjectTask",
    "JuiceHeads",
    "JustRunTwice",
    "OverTrustPenalty",
    "SoftInjection",
    "ZeroTuning",
    "ZeroTuningProfile",
    "accuracy",
    "act",
    "answer_probability",
    "best_heads",
    "calibrate_juice",
    "calibrate_zero_tuning",
    "confidence",
    "context_share",
    "find_act_heads",
    "find_juice_heads",
    "find_sinks",
    "generate_twice",
    "generate_with_rollback",
    "juice",
    "learn_focus_directions",
    "learn_soft_injection",
    "pasta",
    "profile_zero_tuning",
    "run_twice",
    "score_pasta_heads",
    "steer_to_context",
    "task_embedding",
    "zero_tuning",
]
