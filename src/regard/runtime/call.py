"""One attention call: what the model asked for, where it stands, and what edits made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import AttentionMap, TokenMap
from regard.masks import Mask

if TYPE_CHECKING:
    from regard.runtime.reading import Reading
    from regard.runtime.stack import Frame

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Place:
    """Where in a model and in a text a call stands.

    ``path`` is that of the module that made the call, ``layer`` the number of the call among those of a pass, ``pass_index``
    the number of the pass among those of the block. ``query_start`` and ``key_start`` are the positions of the first query
    and the first key in the text: in a decoding step the one query stands at its end. ``token_ids`` (batch, tokens so far)
    are those of the text that the queries stand in, where the model was given any, and ``token_mask`` (batch, queries) tells
    real queries from padding, where the user said. ``cache`` is the model's key–value cache and ``cache_layer`` the call's
    number in it, where there is one. ``frames`` are the modules that ran, the innermost first, for who gives a call its keys.
    """

    path: str = ""
    layer: int = 0
    pass_index: int = 0
    query_start: int = 0
    key_start: int = 0
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    cache: Any = None
    cache_layer: int | None = None
    memo: dict[object, Any] | None = None
    frames: tuple[Frame, ...] = ()

    def remember(self, key: object, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, made once for all calls of a pass."""
        if self.memo is None:
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        made: _Made = self.memo[key]
        return made


_NOWHERE = Place()


class Call(Protocol):
    """What is known of every call that mixes tokens, by whatever matrix: where it stands, and the values that it mixes."""

    @property
    def place(self) -> Place:
        """Where it stands."""
        ...

    @property
    def value(self) -> Tensor:
        """(batch, heads, keys, width)."""
        ...

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What is to be read of its matrix."""
        ...

    def heads(self, index: list[int]) -> Call:
        """The call with these heads alone."""
        ...


@dataclass(frozen=True)
class Column:
    """A term of an edited call's logits: ``query[b, h, i] · key[b, j]``, after scale and mask.

    ``query`` is (B|1, H|1, N|1), ``key`` (B|1, M). A column that ``hides`` is of ones and zeros and takes from each
    query with a one the sight of each key with a one.
    """

    query: Tensor
    key: Tensor
    hides: bool = False


@dataclass(frozen=True)
class Factor:
    """A factor of an edited call's probabilities, after the softmax: ``by``, a number or (1, H|1, 1), where ``query``
    (B|1, H|1, N|1) and ``key`` (B|1, M), booleans, hold.
    """

    query: Tensor
    key: Tensor
    by: float | Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of attention, and what edits made of it.

    Tensors are (batch, heads, tokens, head_dim). The first eight arguments are those of scaled_dot_product_attention;
    ``softcap`` c makes of each logit s ``c·tanh(s/c)`` before the mask, ``sinks`` (Hq,) or (B, Hq, N) are one more logit of
    each row, whose probability goes nowhere; ``rule`` hides besides what it does not show, and counts the call's own
    queries and keys from 0. Of a call that ``is_stored`` only the logits are known: they are its ``attn_mask``, its queries
    and keys are zeros.

    Edits change the tensors, or add to what follows: ``columns`` of the logits, ``factors`` of the probabilities, rows that
    are their ``own`` value (B|1, H, N) instead, a ``gate`` (B|1, H|1, N|1) of the output, and what is ``added`` to it
    (B|1, H, N|1, D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    is_stored: bool = False
    rule: Mask | None = None
    place: Place = _NOWHERE
    columns: tuple[Column, ...] = ()
    factors: tuple[Factor, ...] = ()
    own: Tensor | None = None
    gate: Tensor | None = None
    added: Tensor | None = None
    readings: tuple[Reading, ...] = ()

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> AttentionCall:
        """The call of ``scaled_dot_product_attention(*args, **kwargs)``, made in a third of the time of ``__init__``."""
        call = object.__new__(cls)
        call.__dict__.update(zip(_ARGUMENTS, args, strict=False), **kwargs)  # all else is as the class has it
        return call

    def at(self, place: Place) -> AttentionCall:
        """This call, as it stands elsewhere. What `dataclasses.replace` does, for what is done at every call."""
        other = object.__new__(AttentionCall)
        other.__dict__.update(self.__dict__, place=place)
        return other

    def with_column(self, column: Column) -> AttentionCall:
        """With one more term of the logits."""
        other = object.__new__(AttentionCall)
        other.__dict__.update(self.__dict__, columns=(*self.columns, column))
        return other

    def with_reading(self, reading: Reading) -> AttentionCall:
        """With one more reading of the matrix that is run in the end."""
        other = object.__new__(AttentionCall)
        other.__dict__.update(self.__dict__, readings=(*self.readings, reading))
        return other

    @property
    def factor(self) -> float:
        """Of the logits: ``scale``, 1/√D by default."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    @property
    def edited(self) -> bool:
        """Whether more is to be done than the arguments say."""
        beside = self.own is not None or self.gate is not None or self.added is not None
        return beside or bool(self.columns or self.factors)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient of its output will be wanted."""
        tensors = (self.query, self.key, self.value, self.attn_mask, self.sinks)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def detached(self) -> AttentionCall:
        """The call apart from the model's graph."""
        tensors = (self.query, self.key, self.value, self.attn_mask, self.sinks)
        if not self.columns and not any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return self
        mask, sinks = self.attn_mask, self.sinks
        return replace(
            self, query=self.query.detach(), key=self.key.detach(), value=self.value.detach(),
            attn_mask=None if mask is None else mask.detach(), sinks=None if sinks is None else sinks.detach(),
            columns=tuple(replace(column, query=column.query.detach()) for column in self.columns),
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> AttentionCall:
        """The call in another precision, an additive mask included."""
        mask = self.attn_mask
        return replace(
            self,
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        )

    def heads(self, index: list[int]) -> AttentionCall:
        """The call with these query heads alone, each with a key and value head of its own."""
        shared = self.query.shape[1] // self.key.shape[1]
        key_heads = [head // shared for head in index]
        mask = self.attn_mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, index]
        return replace(
            self,
            query=self.query[:, index],
            key=self.key[:, key_heads],
            value=self.value[:, [head * self.value.shape[1] // self.query.shape[1] for head in index]],
            attn_mask=mask,
            sinks=_of_heads(self.sinks, index),
            rule=None if self.rule is None else self.rule.heads(index),
            enable_gqa=False,
        )

    def map(self) -> AttentionMap:
        """The attention matrix of the arguments, as an operator that is never stored."""
        query, key = self.query, self.key
        if torch.is_autocast_enabled(query.device.type):  # what the operator itself would do to its inputs
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key = query.to(dtype), key.to(dtype)
        return AttentionMap(
            query,
            key,
            self.attn_mask,
            self.is_causal,
            self.scale,
            self.enable_gqa,
            softcap=self.softcap,
            sinks=self.sinks,
            mask=self.rule,
        )

    def require_queries(self, asker: str) -> None:
        """Refuse what would change queries or keys, where they are not known."""
        if self.is_stored:
            raise ValueError(
                f"{asker}: {self.place.path} computes its softmax itself, so its queries and keys are not seen; "
                "edit its logits, as Reweight, Bias and Block do, or choose other layers with layers="
            )


_ARGUMENTS = tuple(one.name for one in fields(AttentionCall))[:8]


def _of_heads(sinks: Tensor | None, index: list[int]) -> Tensor | None:
    return sinks if sinks is None else sinks[index] if sinks.ndim == 1 else sinks[:, index]


def stored_call(logits: Tensor, value: Tensor, sinks: Tensor | None = None, dropout_p: float = 0.0) -> AttentionCall:
    """The call of logits (B, H, N, M) that are stored, beside values (B, H, M, D): whoever made them, they are its mask."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    batch, heads, queries, keys = logits.shape
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    return AttentionCall(
        zero.expand(batch, heads, queries, 1), zero.expand(batch, heads, keys, 1), value.to(dtype),
        without_hidden(logits.to(dtype), torch.finfo(logits.dtype).min),
        dropout_p=dropout_p, scale=1.0, sinks=sinks, is_stored=True,
    )  # fmt: skip


def without_hidden(mask: Tensor, least: float | None = None) -> Tensor:
    """An additive mask with −∞ for the least numbers of its dtype, by which models hide; not in rows that hide all."""
    hidden = mask < (torch.finfo(mask.dtype).min if least is None else least) / 2
    return mask.masked_fill(hidden & ~hidden.all(dim=-1, keepdim=True), -math.inf)


def visible(mask: Tensor) -> Tensor:
    """Where a mask lets a query look, of a boolean or an additive one, by whose lowest numbers models hide."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class HiddenCall:
    """A call of a layer that mixes its values by a matrix of its own, as linear mixers do.

    ``map`` gives its matrix for a place, and is asked only where somebody reads it.
    """

    value: Tensor
    queries: int
    map: Callable[[Place], TokenMap]
    place: Place = _NOWHERE
    readings: tuple[Reading, ...] = ()

    def at(self, place: Place) -> HiddenCall:
        """This call, as it stands elsewhere."""
        return replace(self, place=place)

    def with_reading(self, reading: Reading) -> HiddenCall:
        """With one more reading of the matrix."""
        return replace(self, readings=(*self.readings, reading))

    def heads(self, index: list[int]) -> HiddenCall:
        """The call with these heads alone."""
        return replace(self, value=self.value[:, index])


def normalize(call: AttentionCall, module: Module | None, tokens: int | None) -> AttentionCall:
    """Bring a call of any shape that SDPA takes to four dimensions and a plain mask.

    Args:
        call: as the model made it.
        module: that made it.
        tokens: that the module was given, where it is known.
    """
    if call.is_stored:
        return call
    call = _unpack_grouped_heads(_broadcast(call), module, tokens)
    if call.query.ndim == 4:
        return call
    mask, lead = call.attn_mask, call.query.shape[:-3]
    if mask is not None and mask.ndim > (2 if call.query.ndim < 4 else 3):
        mask = _to_four(mask, lead)
    query, key, value = (_to_four(tensor, lead) for tensor in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, attn_mask=mask)


def _broadcast(call: AttentionCall) -> AttentionCall:
    """Queries for every batch row and head that keys and values have, and keys and values for every batch row."""
    tensors = (call.query, call.key, call.value)
    if call.query.shape[:-2] == call.key.shape[:-2] == call.value.shape[:-2]:
        return call
    batch, heads = tensors[0].shape[:-3], tensors[0].shape[-3:-2]
    if all(t.shape[:-3] == batch and (call.enable_gqa or t.shape[-3:-2] in (heads, (1,))) for t in tensors):
        return call
    front = output_shape(call)[:-2]
    query, key, value = (t.reshape(*[1] * (len(front) + 2 - t.ndim), *t.shape) for t in tensors)
    query = query.expand(*front, *query.shape[-2:])
    key, value = (t.expand(*front[:-1], *t.shape[-3:]) for t in (key, value))
    return replace(call, query=query, key=key, value=value)


def output_shape(call: AttentionCall) -> tuple[int, ...]:
    """Of what the operator returns for it: queries, keys and values may differ in front as broadcasting lets them."""
    own = 3 if call.enable_gqa else 2
    tensors = (call.query, call.key, call.value)
    front = torch.broadcast_shapes(*(tensor.shape[:-own] for tensor in tensors))
    return (*front, *call.query.shape[-own:-1], call.value.shape[-1])


def _to_four(tensor: Tensor, lead: torch.Size) -> Tensor:
    """Four dimensions from fewer, as one head; from more, the leading ones as one batch."""
    if not lead:
        return tensor.reshape(-1, 1, *tensor.shape[-2:])
    return tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, -4)


def _unpack_grouped_heads(call: AttentionCall, module: Module | None, tokens: int | None) -> AttentionCall:
    """Undo a packing of transformers, which passes the query heads of a group as if they were tokens of a decoding step."""
    groups = getattr(module, "num_key_value_groups", 1)
    if tokens != 1 or groups == 1 or call.query.ndim != 4:
        return call
    batch, rows, packed, width = call.query.shape
    if packed != groups or rows != call.key.shape[1]:
        return call
    mask = call.attn_mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], rows * groups, 1, -1)
    return replace(call, query=call.query.reshape(batch, rows * groups, 1, width), attn_mask=mask, enable_gqa=True)
