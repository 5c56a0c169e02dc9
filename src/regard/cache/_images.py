"""What policies have in common that drop nothing but image tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from regard.cache.budget import check_budget, number_of
from regard.cache.policy import Entries, Policy
from regard.cache.ranks import ranks
from regard.cache.rest import Drop, Rest
from regard.tokens import Where, image_tokens, resolve


@dataclass(frozen=True, kw_only=True)
class _ImagePolicy(Policy):
    """A policy that chooses once, in the pass that reads an image, which of its tokens stay; text stays in any case.

    What is left of images of earlier turns stays too.
    """

    budget: int | float = field(default=1.0, kw_only=False)
    rest: Rest = Drop()
    image: Where | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget, 1, type(self).__name__)

    def beside(self, model: Module) -> AbstractContextManager[Any]:
        """Where the image tokens are."""
        return nullcontext(self.image_of(model))

    def image_of(self, model: Module) -> Where:
        """The image tokens that were named, or those that the model's config names."""
        return image_tokens(model) if self.image is None else self.image

    def counts(self, entries: Entries, scores: Tensor) -> Tensor:
        """Text, and the image tokens that stay: those that score above 0."""
        return (scores > 0).sum(dim=-1)

    def new_image(self, entries: Entries, image: Where) -> Tensor:
        """(batch, seen) boolean: the image tokens that this pass brought."""
        batch, device = len(entries.keys), entries.keys.device
        token = torch.arange(entries.seen, device=device)
        found = resolve(
            image, 0, entries.seen, batch=batch, token_ids=entries.token_ids, device=device, what="image"
        ).expand(batch, -1)
        if entries.text is not None:
            found = found & entries.text
        if not bool(found.any(dim=1).all()):
            row = int((~found.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"{type(self).__name__} drops image tokens, and text {row} of the batch has none among its "
                f"{int(entries.tokens[row])} tokens: pass the image, or say with image= where it stands"
            )
        return found & (token >= entries.seen - entries.new)

    def targets(self, tokens: Tensor) -> Tensor:
        """How many of so many image tokens stay."""
        return number_of(self.budget, tokens).minimum(tokens)


def best(scores: Tensor, among: Tensor, numbers: Tensor) -> Tensor:
    """(rows, tokens) boolean: the highest scores among some tokens, so many of each row; of equals the first."""
    return among & (ranks(scores.masked_fill(~among, -torch.inf), dim=1) < numbers[:, None])


def at_entries(stay: Tensor, entries: Entries) -> Tensor:
    """1 for the entries of tokens (batch, seen) that stay, 0 for the others."""
    stay = stay[:, None].expand(-1, entries.positions.shape[1], -1)
    return stay.gather(2, entries.positions.clamp(min=0)).to(entries.received.dtype)
