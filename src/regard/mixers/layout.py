"""How the tokens of a call lie and what they see: given to a mixer, and not assumed by it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What a mixer is told of the tokens (B, N, dim) of one call beside them.

    Args:
        mask: (B, N), false for padding; None where all tokens are real.
        grid: sides of an image, a video or the like, whose product is N, rows first; None for a text.
        context: (B, M, dim), other tokens, which these look at instead of one another.
        context_mask: (B, M), false for its padding.
        causal: whether a token sees those up to it alone.
        cross: whether it is a context that is looked at, that of this call or the one that the state began with.

    >>> Layout(grid=(4, 6), causal=False).cross
    False
    """

    mask: Tensor | None = None
    grid: tuple[int, ...] | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    causal: bool = True
    cross: bool = False

    def check(self, x: Tensor, name: str) -> None:
        """Refuse what does not fit the tokens (B, N, dim) of the mixer of this name.

        Raises:
            ValueError: a mask, a grid or a context of another shape.
        """
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != x.shape[:2]):
            raise ValueError(
                f"{name} takes a boolean mask of shape {tuple(x.shape[:2])}, got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        if self.grid is not None and (min(self.grid, default=0) < 1 or math.prod(self.grid) != x.shape[1]):
            raise ValueError(
                f"{name} was given {x.shape[1]} tokens and a grid of sides {tuple(self.grid)}, of "
                f"{math.prod(self.grid)} places"
            )
        self._check_context(x, name)

    def _check_context(self, x: Tensor, name: str) -> None:
        context, mask = self.context, self.context_mask
        if context is None:
            if mask is not None:
                raise ValueError(f"{name} was given a context_mask and no context")
            return
        if context.ndim != 3 or (len(context), context.shape[2]) != (len(x), x.shape[2]) or not context.shape[1]:
            raise ValueError(
                f"{name} takes a context of shape ({len(x)}, tokens, {x.shape[2]}), at least one token, got "
                f"{tuple(context.shape)}"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != context.shape[:2]):
            raise ValueError(
                f"{name} takes a boolean context_mask of shape {tuple(context.shape[:2])}, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(dim=1).all()):
            empty = [row for row, real in enumerate(mask.any(dim=1).tolist()) if not real]
            raise ValueError(f"{name} was given contexts without a real token, of texts {empty}")


def as_boolean(mask: Tensor | None, name: str) -> Tensor | None:
    """The mask, boolean also where it was given as whole numbers, 1 for real tokens, as tokenizers make it.

    Raises:
        ValueError: whole numbers other than 0 and 1.

    >>> as_boolean(torch.tensor([[0, 1, 1]]), "mask")
    tensor([[False,  True,  True]])
    """
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point() or mask.is_complex():
        return mask
    if not torch.compiler.is_compiling() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name} tells real tokens by 1 and padding by 0, got {mask.unique().tolist()}")
    return mask != 0


PLAIN = Layout()
"""A text, all of whose tokens are real."""
