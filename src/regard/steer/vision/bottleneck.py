"""A layer of one head through which all that a model sees of an image must pass, and whose map a user may edit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import LayerNorm, Linear, Module, Sequential
from torch.nn.modules.activation import GELU


class Passed(NamedTuple):
    """What passes a bottleneck, ``output`` (batch, tokens, dim), and how much of each patch, ``map`` (batch, patches)."""

    output: Tensor
    map: Tensor


class AttentionBottleneck(Module):
    """``y_0 = (1 − P_00) · Σ_j P_0j v_j`` for the class token: the less it looks at itself, the more of the image passes.

    P is one head's, of the class token's query over the keys of a class token and the patches. ``map`` is what the class
    token gives to the patches, ``(1 − P_00) P_0j``; its sum is between 0 and 1, and at 0 nothing of the image passes. There
    is no residual path around the layer, but one around the MLP after it: ``output = x + MLP(LN(x))``, x the projected y. A
    user edits ``map`` and passes it as ``attention``; then nothing else of P matters. P. Rahmanzadehgervi, H. H. Nguyen,
    R. Liu, L. Mai, A. T. Nguyen (2024), TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in
    Vision-Language Models.

    To be trained with its model, in the place of an encoder's last layer; for changes between two images, each looks at
    the other, with ``context``. Only the class token goes on, as in the authors' code, so that ``output`` is of length
    1. Their MLP has CLIP's QuickGELU, x·σ(1.702 x), this one GELU: their weights do not carry over exactly. Left out:
    the encoder, the captioner, and the loss that teaches the map where changes are.

    Args:
        dim: of the tokens.
        width: of the MLP; four times ``dim`` by default.

    Raises:
        ValueError: tokens or a map of shapes that do not fit; a map that is negative or sums to more than 1.

    >>> import torch
    >>> bottleneck = AttentionBottleneck(16)
    >>> tokens = torch.randn(1, 5, 16)  # a class token and four patches
    >>> passed = bottleneck(tokens)
    >>> passed.output.shape, passed.map.shape
    (torch.Size([1, 1, 16]), torch.Size([1, 4]))
    >>> nothing = torch.zeros(1, 4)
    >>> bool(torch.equal(bottleneck(tokens, attention=nothing).output, bottleneck(2 * tokens, attention=nothing).output))
    True
    """

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if width is None else width
        self.dim = dim
        self.before, self.after = LayerNorm(dim), LayerNorm(dim)
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.mlp = Sequential(Linear(dim, hidden), GELU(), Linear(hidden, dim))

    def forward(self, tokens: Tensor, context: Tensor | None = None, attention: Tensor | None = None) -> Passed:
        """What passes of the context's patches to the tokens' class token.

        Args:
            tokens: (batch, 1 + patches, dim), the class token first.
            context: the same of the image to look at; that of ``tokens`` by default.
            attention: (batch or 1, patches), a map in the place of the layer's own.
        """
        context = tokens if context is None else context
        for name, given in (("tokens", tokens), ("context", context)):
            if given.ndim != 3 or given.shape[2] != self.dim or given.shape[1] < 2:
                raise ValueError(
                    f"AttentionBottleneck needs {name} of shape (batch, 1 + patches, {self.dim}), got {tuple(given.shape)}"
                )
        seen = self.before(context)
        query, key, value = self.query(self.before(tokens[:, :1])), self.key(seen), self.value(seen)
        row = torch.softmax(query @ key.transpose(1, 2) * self.dim**-0.5, dim=-1)
        row = row * (1 - row[..., :1])
        if attention is not None:
            row = torch.cat([row.new_zeros(len(row), 1), self._checked(attention, row)], dim=1)[:, None]
        x = self.out(row @ value)
        return Passed(x + self.mlp(self.after(x)), row[:, 0, 1:])

    def _checked(self, attention: Tensor, row: Tensor) -> Tensor:
        batch, patches = row.shape[0], row.shape[2] - 1
        if attention.ndim != 2 or attention.shape[0] not in (1, batch) or attention.shape[1] != patches:
            raise ValueError(
                f"AttentionBottleneck needs a map of shape ({batch} or 1, {patches}), got {tuple(attention.shape)}"
            )
        total = attention.sum(dim=1)
        if bool((attention < 0).any()) or bool((total > 1 + 1e-4).any()):
            raise ValueError(
                "AttentionBottleneck needs a map of numbers that are not negative and sum to at most 1, got a least one of "
                f"{float(attention.min()):.3g} and a largest sum of {float(total.max()):.3g}; divide by the sum"
            )
        return attention.to(row).expand(batch, -1)
