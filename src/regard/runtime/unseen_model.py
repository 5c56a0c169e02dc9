"""What was not seen of a model, and what to do about it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping

from torch.nn import Module

_SEEN = (
    "torch.nn.functional.scaled_dot_product_attention, nn.MultiheadAttention, transformers' eager attention, or a softmax "
    "that enters a product with values"
)
_KNOWN = (None, "sdpa", "eager")
IN_PARTS = "some of its keys at a time"
"""Said of a softmax over keys that enters no one product with values."""

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
_WITHOUT = re.compile("mamba|ssm|rwkv|recurrent|retention", re.IGNORECASE)


def explain(model: Module | None, softmaxes: Mapping[str, str] | None = None) -> str:
    """For a block in which no call was seen; the softmaxes that were not followed, by the path of their module."""
    found = _listed(softmaxes or {})
    if model is None:
        return f"no attention call was seen in the block: nothing in it called {_SEEN}{found}"
    name = type(model).__name__
    other = dict(_other_implementations(model))
    if other:
        implementation = next(iter(other.values()))
        return (
            f"no attention call was seen: {name} was not run inside the block, or runs attn_implementation="
            f"{implementation!r}, which does not call {_SEEN}{found}. Before the block, call: "
            f'model.set_attn_implementation("{_better(model)}")'
        )
    kinds = {type(module).__name__ for module in model.modules()}
    if (linear := sorted(filter(_WITHOUT.search, kinds))) and not any(map(_ATTENTION.search, kinds)):
        return (
            f"no attention call was seen: {name} has none, but {linear[0]}; of such layers those of Mamba, Qwen3-Next and "
            "Qwen3.5 can be seen, once regard.mixers.replace_linear_layers has made mixers of them"
        )
    return (
        f"no attention call was seen in {name}: it was not run inside the block, or its attention is its own code, not "
        f"{_SEEN}{found}. Compute it there, or build regard.AttentionMap from its queries and keys; a mixer is seen where it "
        "has a map()"
    )


def warn(model: Module | None, seen: Iterable[str], softmaxes: Mapping[str, str]) -> None:
    """For a block in which some calls were seen: name those that were not, before what was seen is taken for all."""
    paths = list(seen)
    own = {
        path: where
        for path, where in softmaxes.items()
        if IN_PARTS in where or (_ATTENTION.search(where) and not _within(path, paths))
    }
    other = [] if model is None else list(_other_implementations(model))
    for path, implementation in other:
        if not any(_within(one, [path]) for one in paths):
            own[path or type(model).__name__] = f"runs attn_implementation={implementation!r}, if it ran"
    if own:
        warnings.warn(f"attention that was not seen{_listed(own)}", UserWarning, stacklevel=_users_level())


def _users_level() -> int:
    """How far up the stack of `warn` the user's own code is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("regard."):
        frame, level = frame.f_back, level + 1
    return level


def name_softmaxes(model: Module | None, softmaxes: Iterable[tuple[Module, str]]) -> dict[str, str]:
    """Softmaxes of the model's own modules that entered no product with values: class and line, by path."""
    taken = list(softmaxes)
    if not taken:
        return {}
    names = {} if model is None else {module: path for path, module in model.named_modules()}
    named = {}
    for module, line in taken:
        if model is None or module in names:
            kind = type(module).__name__
            named[names.get(module) or kind] = f"softmax of {kind} at {line}"
    return named


def _other_implementations(model: Module) -> Iterator[tuple[str, str]]:
    """Parts of the model that have a configuration of their own with attention that is not seen."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if not hasattr(type(module), "set_attn_implementation"):  # of few modules, and asked at every exit
            continue
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation in _KNOWN or not isinstance(implementation, str):
            continue
        if not any(_within(path, [outer]) for outer in taken):
            taken.append(path)
            yield path, implementation


def _better(model: Module) -> str:
    """The implementation that the model has and that is seen."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _within(path: str, others: Iterable[str]) -> bool:
    return any(not other or path == other or path.startswith(f"{other}.") for other in others)


def _listed(named: Mapping[str, str]) -> str:
    if not named:
        return ""
    several = [f"{path} ({where})" for path, where in named.items()]
    more = f" and {len(several) - 4} more" if len(several) > 4 else ""
    return f": {'; '.join(several[:4])}{more}"
