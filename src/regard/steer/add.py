"""Add directions to queries, keys, values and outputs of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, key_set, query_set
from regard.tokens import Where

Direction = Sequence[float] | Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True, repr=False)
class AddToQuery(Edit):
    """``q'_i = q_i + direction``, as the call sees queries: after rotary positions.

    Args:
        direction: (head_dim,) for all chosen heads, or (heads, head_dim) for each of the layer's; a tensor may be learned.
        queries: only these; all by default.

    Raises:
        ValueError: a direction of another shape.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q = k = torch.eye(2)[None, None]
    >>> with regard.steer(None, regard.AddToQuery([0.0, 9.0])):
    ...     attention(q, k, torch.eye(2)[None, None])[0, 0, 0].round(decimals=2)
    tensor([0., 1.])
    """

    direction: Direction
    queries: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Longer queries."""
        rows = query_set(self.queries, call, heads)[..., None]
        direction = _direction(self, call, call.query.shape[3])
        return replace(call, query=torch.where(rows, call.query + direction, call.query))


@dataclass(frozen=True, repr=False)
class AddToKey(Edit):
    """``k'_j = k_j + direction``, as the chosen heads see keys: after rotary positions.

    Added to every key a direction moves all logits of a query alike, which no softmax notices but one with a sink's logit or
    a soft cap: it is the choice of ``keys`` that counts.

    Args:
        direction: (head_dim,) for all chosen heads, or (heads, head_dim) for each of the layer's query heads; a tensor may
            be learned.
        keys: only these; all by default.

    Raises:
        ValueError: a direction of another shape.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q = k = torch.eye(2)[None, None]
    >>> with regard.steer(None, regard.AddToKey([9.0, 0.0], keys=1)):
    ...     attention(q, k, torch.eye(2)[None, None])[0, 0, 0].round(decimals=2)
    tensor([0., 1.])
    """

    direction: Direction
    keys: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Longer keys; keys of their own for every query head, where those that share them differ."""
        direction = _direction(self, call, call.key.shape[3])
        if len(heads) == len(direction) == 1:
            return replace(call, key=torch.where(_keys(self.keys, call, heads), call.key + direction, call.key))
        call = with_own_keys(call)
        return replace(call, key=torch.where(_keys(self.keys, call, heads), call.key + direction, call.key))


@dataclass(frozen=True, repr=False)
class AddToValue(Edit):
    """``v'_j = v_j + direction``, as the chosen heads find values: each output moves by its attention to these keys.

    Args:
        direction: (width,) for all chosen heads, or (heads, width) for each of the layer's query heads; a tensor may be
            learned.
        keys: only these; all by default, which moves each output by the direction, as `AddToOutput` does.

    Raises:
        ValueError: a direction of another shape.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v = torch.zeros(3, 1, 1, 4, 2)
    >>> with regard.steer(None, regard.AddToValue([8.0, 4.0], keys=[0])):
    ...     attention(q, k, v)[0, 0, 0]
    tensor([2., 1.])
    """

    direction: Direction
    keys: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Other values; values of their own for every query head, where those that share them differ."""
        direction = _direction(self, call, call.value.shape[3])
        if not len(heads) == len(direction) == 1:
            call = with_own_keys(call)
        return replace(call, value=torch.where(_keys(self.keys, call, heads), call.value + direction, call.value))


@dataclass(frozen=True, repr=False)
class AddToOutput(Edit):
    """``O'_i = O_i + direction``: to what heads put out, before the heads are mixed.

    Gates before it do not scale the direction, gates after it do.

    Args:
        direction: (width,) for all chosen heads, or (heads, width) for each of the layer's; a tensor may be learned. In the
            paper it is α σ θ: a strength, the deviation of outputs along the direction, and a direction of length 1.
        queries: only these; all by default.

    Raises:
        ValueError: a direction of another shape.

    K. Li, O. Patel, F. Viégas, H. Pfister, M. Wattenberg (2023), Inference-Time Intervention: Eliciting Truthful Answers from
    a Language Model.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v = torch.zeros(3, 1, 2, 3, 2)
    >>> with regard.steer(None, regard.AddToOutput([3.0, 1.0], queries=-1, heads=1)):
    ...     attention(q, k, v)[0, 1]
    tensor([[0., 0.],
            [0., 0.],
            [3., 1.]])
    """

    direction: Direction
    queries: Where | None = None

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """More to add."""
        direction = _direction(self, call, call.value.shape[3])
        return with_added(call, query_set(self.queries, call, heads), direction)


def with_added(call: AttentionCall, rows: Tensor, more: Tensor) -> AttentionCall:
    """The call with ``more`` (B|1, H|1, N|1, Dv) added to what it puts out in these rows."""
    more = torch.where(rows[..., None], more, more.new_zeros(()))
    return replace(call, added=more if call.added is None else call.added + more)


def _keys(where: Where | None, call: AttentionCall, heads: Tensor) -> Tensor:
    """(B|1, H|1, M|1, 1) boolean: these keys of the chosen heads."""
    chosen = heads[None, :, None, None]
    return chosen if where is None else chosen & key_set(where, call)[:, None, :, None]


def with_own_keys(call: AttentionCall) -> AttentionCall:
    """The call with a key and a value head for each query head."""
    number = call.query.shape[1]
    key, value = (tensor.repeat_interleave(number // tensor.shape[1], dim=1) for tensor in (call.key, call.value))
    return replace(call, key=key, value=value, enable_gqa=False)


def _direction(edit: AddToQuery | AddToKey | AddToValue | AddToOutput, call: AttentionCall, width: int) -> Tensor:
    """(H|1, 1, width)."""
    if isinstance(edit, AddToQuery | AddToKey):
        call.require_queries(type(edit).__name__)
    direction = torch.as_tensor(edit.direction, dtype=call.query.dtype, device=call.query.device)
    heads = call.query.shape[1]
    if direction.shape not in ((width,), (heads, width)):
        raise ValueError(
            f"{type(edit).__name__} needs a direction of shape ({width},) or ({heads}, {width}) for {call.place.path}, "
            f"got {tuple(direction.shape)}"
        )
    return direction.reshape(-1, 1, width)
