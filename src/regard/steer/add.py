"""Add directions to queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, key_set, query_set
from regard.tokens import Where

Direction = Sequence[float] | Tensor


@dataclass(frozen=True, repr=False)
class AddToQuery(Edit):
    """``q'_i = q_i + direction``, as the call sees queries: after rotary positions.

    Args:
        direction: (head_dim,) for all chosen heads, or (heads, head_dim) for each of the layer's.
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
        return replace(call, query=torch.where(rows, call.query + _direction(self, call), call.query))


@dataclass(frozen=True, repr=False)
class AddToKey(Edit):
    """``k'_j = k_j + direction``, as the chosen heads see keys: after rotary positions.

    Args:
        direction: (head_dim,) for all chosen heads, or (heads, head_dim) for each of the layer's query heads.
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
        direction = _direction(self, call)
        chosen = heads[None, :, None, None]
        if self.keys is not None:
            chosen = chosen & key_set(self.keys, call)[:, None, :, None]
        if len(heads) == len(direction) == 1:
            return replace(call, key=torch.where(chosen, call.key + direction, call.key))
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (call.key, call.value))
        key = torch.where(chosen, key + direction, key)
        return replace(call, key=key, value=value, enable_gqa=False)


def _direction(edit: AddToQuery | AddToKey, call: AttentionCall) -> Tensor:
    """(H|1, 1, D)."""
    call.require_queries(type(edit).__name__)
    direction = torch.as_tensor(edit.direction, dtype=call.query.dtype, device=call.query.device)
    heads, width = call.query.shape[1], call.query.shape[3]
    if direction.shape not in ((width,), (heads, width)):
        raise ValueError(
            f"{type(edit).__name__} needs a direction of shape ({width},) or ({heads}, {width}) for {call.place.path}, "
            f"got {tuple(direction.shape)}"
        )
    return direction.reshape(-1, 1, width)
