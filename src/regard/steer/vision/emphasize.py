"""Larger logits for chosen keys, in proportion to what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit, check_number, key_set
from regard.steer.vision._prompt import add_to_last, last_query, masses
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class Emphasize(Edit):
    """``s'_ij = s_ij + by · w_h · |s_ij|`` for the keys j of a set, i the last query, s its logits before the mask.

    With ``sensitivity``, w_h is what head h gives to those keys over what the head that gives them most does; without, 1.
    Edits of the logits before this one count in w_h and not in s. The last query is the one that the next token comes from:
    of the prompt's tokens the last alone is edited, and every token that ``generate`` adds.

    The form is that of S. Liu, K. Zheng, W. Chen (2024), Paying More Attention to Image: A Training-Free Method for
    Alleviating Hallucination in LVLMs.

    Args:
        keys: as for `Reweight`.
        by: at least 0.
        sensitivity: keys of the image, whose attention tells how visual a head is.

    Raises:
        ValueError: ``by`` negative, infinite or NaN.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -1.0, 1.0])[None, None, :, None]
    >>> with regard.steer(None, Emphasize(keys=[1, 2], by=1)):
    ...     attention(q, k, torch.eye(3)[None, None])[0, 0, 0]  # of the logits 0, 0 and 2
    tensor([0.1065, 0.1065, 0.7870])
    """

    places: ClassVar[tuple[str, ...]] = ("keys", "sensitivity")

    keys: Where
    by: float
    sensitivity: Where | None = None

    def __post_init__(self) -> None:
        check_number(self, "by", low=0)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """Terms of each head's own."""
        query = call.query[:, :, -1].float()
        groups = query.shape[1] // call.key.shape[1]
        grouped = query.unflatten(1, (-1, groups))
        logits = (grouped @ call.key.float().transpose(-1, -2)).flatten(1, 2) * call.factor  # (B, H, M)
        added = self.by * logits.abs() * key_set(self.keys, call)[:, None]
        if self.sensitivity is not None:
            (mass,) = masses(last_query(call), key_set(self.sensitivity, call))
            added = added * (mass / mass.amax(dim=1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny))
        return add_to_last(call, heads, added)
