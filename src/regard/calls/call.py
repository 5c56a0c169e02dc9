"""One attention call, as the model made it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from regard.maps import AttentionMap

_Made = TypeVar("_Made")


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
    """A factor of an edited call's probabilities, after the softmax: ``by`` where ``query`` and ``key`` (booleans) hold."""

    query: Tensor
    key: Tensor
    by: float


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of scaled_dot_product_attention, and where in the model and in the text it stands.

    Tensors are (batch, heads, tokens, head_dim). ``path`` is the path of the module that made the call, ``layer`` the
    number of this call among those of a pass, ``pass_index`` the number of the pass. ``query_start`` and ``key_start`` are
    the positions of the first query and the first key in the text: in a decode step the one query stands at its end.
    ``token_ids`` (batch, tokens so far) are those of the text that the queries stand in, where the model was given any,
    ``token_mask`` (batch, queries) tells real queries from padding, where the user said.

    Edits change the tensors, or add to what follows: ``columns`` of the logits, ``factors`` of the probabilities, rows that
    are their ``own`` value (B|1, H, N) instead, and a ``gate`` (B|1, H|1, N|1) of the output.

    ``past`` is the number of tokens before the call's own, where its maker says. A layer that mixes its values by a matrix of
    its own, as linear mixers do, has neither queries nor keys: they are NaN, one number wide.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    path: str = ""
    layer: int = 0
    pass_index: int = 0
    query_start: int = 0
    key_start: int = 0
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    columns: tuple[Column, ...] = ()
    factors: tuple[Factor, ...] = ()
    own: Tensor | None = None
    gate: Tensor | None = None
    memo: dict[object, Any] | None = None
    past: int | None = None

    def remember(self, key: object, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, made once for all calls of a pass that share their ``memo``."""
        if self.memo is None:
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        made: _Made = self.memo[key]
        return made

    def changed(self, **fields: Any) -> AttentionCall:
        """A copy with these fields. `dataclasses.replace` is clearer and slower; this is for what is done at every call."""
        other = object.__new__(AttentionCall)
        other.__dict__.update(self.__dict__, **fields)
        return other

    @property
    def factor(self) -> float:
        """Of the logits: ``scale``, 1/√D by default."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    def placed_as(self, other: AttentionCall) -> AttentionCall:
        """This call in the other's place in model and text."""
        names = ("path", "layer", "pass_index", "query_start", "key_start", "token_ids", "memo")
        return replace(self, **{name: getattr(other, name) for name in names})

    @property
    def edited(self) -> bool:
        """Whether more is to be done than the tensors say."""
        return bool(self.columns or self.factors) or self.own is not None or self.gate is not None

    def to(self, dtype: torch.dtype) -> AttentionCall:
        """The same call in another precision, an additive mask included."""
        mask = self.attn_mask
        return replace(
            self,
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        )

    def map(self) -> AttentionMap:
        """The call's attention matrix, detached from the model's gradients."""
        query, key, mask = self.query.detach(), self.key.detach(), self.attn_mask
        if torch.is_autocast_enabled(query.device.type):  # what the operator itself would do to its inputs
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key = query.to(dtype), key.to(dtype)
        mask = None if mask is None else mask.detach()
        return AttentionMap(query, key, mask, self.is_causal, self.scale, self.enable_gqa)

    def heads(self, index: list[int]) -> AttentionCall:
        """The same call with these query heads alone, each with a key and value head of its own."""
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
            enable_gqa=False,
        )


def normalize(call: AttentionCall, module: Module | None) -> AttentionCall:
    """Bring a call of any shape that SDPA takes to four dimensions and a plain mask."""
    call = _unpack_grouped_heads(call, module)
    if call.query.ndim == 4:
        return call
    mask, lead = call.attn_mask, call.query.shape[:-3]
    if mask is not None and mask.ndim > (2 if call.query.ndim < 4 else 3):
        mask = _to_four(mask, lead)
    query, key, value = (_to_four(tensor, lead) for tensor in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, attn_mask=mask)


def _to_four(tensor: Tensor, lead: torch.Size) -> Tensor:
    """Four dimensions from fewer, as one head; from more, the leading ones as one batch."""
    if not lead:
        return tensor.reshape(-1, 1, *tensor.shape[-2:])
    return tensor.expand(*lead, *tensor.shape[-3:]).flatten(0, -4)


def _unpack_grouped_heads(call: AttentionCall, module: Module | None) -> AttentionCall:
    """Undo a packing of transformers, if a module's call is packed."""
    groups = getattr(module, "num_key_value_groups", 1)
    _, rows, tokens, _ = call.query.shape[-4:] if call.query.ndim == 4 else (0, 0, 0, 0)
    if groups == 1 or tokens != groups or call.key.shape[1] != rows:
        return call
    heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if rows * groups != heads:
        return call
    return unpacked(call)


def unpacked(call: AttentionCall) -> AttentionCall:
    """A decode step with its query heads as heads: with a mask, transformers passes those of a group as if tokens."""
    batch, rows, groups, width = call.query.shape
    mask = call.attn_mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], rows * groups, 1, -1)
    return replace(call, query=call.query.reshape(batch, rows * groups, 1, width), attn_mask=mask, enable_gqa=True)
