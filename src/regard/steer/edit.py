"""What every edit of attention has in common: which layers, heads, queries and keys it is about."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.notation import differs
from regard.runtime import AttentionCall, Column
from regard.tokens import Heads, Layers, Passes, Where, resolve


@dataclass(frozen=True, kw_only=True, repr=False)
class Edit(ABC):
    """One edit of the attention of some layers and heads; a subclass says in `apply` what it does to a call.

    Args:
        layers: the number of an attention call in order, negative from the last, a slice or range of them, a glob on its
            module's path, or several of these; all by default.
        heads: numbers of query heads, or a mapping from layers to them, which chooses those layers where ``layers`` does
            not; all by default.
        passes: numbers of the model's passes in the block: of ``generate`` 0 is the prompt and each step one more, in
            diffusion they are the denoising steps; all by default.
    """

    places: ClassVar[tuple[str, ...]] = ("keys", "queries")
    """The arguments that are positions in the text."""

    layers: Layers | None = field(default=None)
    heads: Heads | Mapping[Any, Heads] | None = field(default=None)
    passes: Passes | None = field(default=None)

    @abstractmethod
    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """The edited call; ``heads`` (Hq,) tells the chosen heads, of length 1 where all are."""

    def given(self) -> dict[str, Any]:
        """The arguments that are not left at their default, by name; the edit's own first."""
        ordered = sorted(fields(self), key=lambda field: bool(field.kw_only))
        values = {f.name: getattr(self, f.name) for f in ordered}
        return {f.name: values[f.name] for f in ordered if differs(values[f.name], f.default)}

    def __repr__(self) -> str:
        """The edit as one would write it."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    def positions(self) -> dict[str, Where]:
        """The chosen positions, by the name of their argument."""
        named = {name: getattr(self, name, None) for name in self.places}
        return {name: where for name, where in named.items() if where is not None}


def key_set(where: Where, call: AttentionCall) -> Tensor:
    """(B|1, M) boolean: the call's keys at these positions."""
    return _resolved(where, call, call.place.key_start, call.key.shape[2], "keys")


def query_set(where: Where | None, call: AttentionCall, heads: Tensor) -> Tensor:
    """(B|1, H|1, N|1) boolean: the chosen queries of the chosen heads."""
    chosen = heads[None, :, None]
    if where is None:
        return chosen
    return chosen & _resolved(where, call, call.place.query_start, call.query.shape[2], "queries")[:, None]


def _filled(call: AttentionCall, start: int, length: int) -> int:
    """How many of these tokens the text has: the keys of a static cache go on beyond it, up to the cache's length."""
    layers, number = getattr(call.place.cache, "layers", ()), call.place.cache_layer
    layer = layers[number] if number is not None and number < len(layers) else None
    if getattr(layer, "max_cache_len", None) != call.key.shape[2]:
        return length
    return max(min(length, call.place.query_start + call.query.shape[2] - start), 0)


Strength = float | Sequence[float] | Tensor
"""How much: a number, or a tensor of one, or of one for each head of a layer; a tensor may be learned."""


def check_strength(edit: Edit, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a strength that is NaN, infinite, out of range, or of more dimensions than one."""
    value = getattr(edit, name)
    if not isinstance(value, Tensor | list | tuple):
        check_number(edit, name, low, high)
        return
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{type(edit).__name__} needs {name} to hold numbers, got {value!r}") from error
    if tensor.ndim > 1 or not tensor.numel() or tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(
            f"{type(edit).__name__} needs {name} to be a number, or a tensor of shape () or (heads,), got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}"
        )
    wrong = ~(tensor.isfinite() & (tensor >= low) & (tensor <= high))
    if bool(wrong.any()):
        between = _between(low, high)
        raise ValueError(f"{type(edit).__name__} needs each of {name} to be a {between}, got {tensor[wrong].tolist()}")


def strength(
    edit: Edit, name: str, call: AttentionCall, low: float = -math.inf, high: float = math.inf
) -> float | Tensor:
    """The number, or a tensor (1, H|1, 1) on the call's device, in float32 at least, through which gradients go."""
    value = getattr(edit, name)
    if not isinstance(value, Tensor | list | tuple):
        return float(value)
    check_strength(edit, name, low, high)  # again, for an optimizer may have moved it
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    tensor = torch.as_tensor(value, dtype=dtype, device=call.query.device)
    heads = call.query.shape[1]
    if tensor.ndim and len(tensor) != heads:
        raise ValueError(
            f"{type(edit).__name__}: {name} is of {len(tensor)} heads, but {call.place.path} has {heads}; give one for each "
            "head of the layer, chosen or not, and choose layers that have as many with layers="
        )
    return tensor.reshape(1, -1, 1)


def with_column(edit: Edit, call: AttentionCall, heads: Tensor, make: Callable[[], Column]) -> AttentionCall:
    """The call with one more column, made once for the layers of a pass for which it is the same."""
    shape = (call.query.shape[0], call.query.shape[2], call.key.shape[2], call.place.query_start, call.place.key_start)
    key = (id(edit), id(heads), shape, call.query.dtype, call.query.device)
    column, *_ = call.place.remember(
        key, lambda: (make(), edit, heads)
    )  # which, while they are kept, have their ids to themselves
    return call.with_column(column)


def column(rows: Tensor, by: float | Tensor, keys: Tensor, call: AttentionCall) -> Column:
    """The term ``by`` of the logits for these rows and keys, in the precision of the call and at least in float32."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    return Column(rows.to(dtype) * by, keys.to(dtype))


def hiding(rows: Tensor, keys: Tensor, call: AttentionCall) -> Column:
    """Takes these keys out of these rows' sight."""
    return replace(column(rows, 1.0, keys, call), hides=True)


def _resolved(where: Where, call: AttentionCall, start: int, length: int, what: str) -> Tensor:
    """(B|1, length) boolean: which of the tokens start … start + length − 1 are meant."""
    batch, device = call.query.shape[0], call.query.device
    key = ("positions", id(where), start, length, batch, device)

    def make() -> tuple[Tensor, Where]:
        ids = call.place.token_ids
        filled = _filled(call, start, length) if callable(where) else length
        try:
            mask = resolve(where, start, filled, batch=batch, token_ids=ids, device=device, what=what)
            return pad(mask, (0, length - filled)), where
        except ValueError as error:
            raise ValueError(f"{call.place.path}: {error}") from error

    return call.place.remember(key, make)[0]


def check_number(edit: Edit, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse a parameter that is NaN, infinite or out of range."""
    value = getattr(edit, name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ValueError(f"{type(edit).__name__} needs {name} to be a {_between(low, high)}, got {value!r}")


def _between(low: float, high: float) -> str:
    if not math.isfinite(low):
        return "finite number"
    return f"number from {low:g} to {high:g}" if math.isfinite(high) else f"finite number of at least {low:g}"
