"""Why a block saw no attention call, and what to do about it."""

from __future__ import annotations

from torch.nn import Module

_SEEN = "torch.nn.functional.scaled_dot_product_attention or nn.MultiheadAttention"


def explain_no_call(model: Module | None, ran: bool) -> str:
    """The error message for a block without attention calls."""
    if model is None:
        return f"no attention call was seen in the block: nothing in it called {_SEEN}"
    name = type(model).__name__
    if not ran:
        return f"no attention call was seen: {name} was not run inside the block"
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        return (
            f"no attention call was seen: {name} runs attn_implementation={implementation!r}, which does not call {_SEEN}. "
            'Before watching, call: model.set_attn_implementation("sdpa")'
        )
    return (
        f"no attention call was seen in {name}: its attention is its own code, not {_SEEN}. "
        "Compute it there, or build regard.AttentionMap from its queries and keys"
    )
