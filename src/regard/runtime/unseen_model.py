"""Why nothing was seen of a model, and what to do about it."""

from __future__ import annotations

from torch.nn import Module

_SEEN = "torch.nn.functional.scaled_dot_product_attention or nn.MultiheadAttention"


def explain(model: Module | None) -> str:
    """For a block in which no call was seen."""
    if model is None:
        return f"no attention call was seen in the block: nothing in it called {_SEEN}"
    name = type(model).__name__
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa"):
        return (
            f"no attention call was seen: {name} was not run inside the block, or runs attn_implementation="
            f'{implementation!r}, which does not call {_SEEN}. Before the block, call: model.set_attn_implementation("sdpa")'
        )
    return (
        f"no attention call was seen in {name}: it was not run inside the block, or its attention is its own code, not "
        f"{_SEEN}. Compute it there, or build regard.AttentionMap from its queries and keys; a mixer is seen where it "
        "has a map()"
    )
