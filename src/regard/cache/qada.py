"""Heads that read far entries only when a guess says that it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache.controls import KeepAll
from regard.cache.policy import Step
from regard.cache.rest import Rest
from regard.cache.unread import Unread

if TYPE_CHECKING:
    from regard.cache.kept_call import KeptCall
    from regard.cache.layer import KeptLayer


@dataclass(frozen=True, kw_only=True)
class QAdA(KeepAll):
    """In each decoding step each query head reads all entries, or its local ones only: ``sinks`` first and ``recent`` last.

    A head is local for a query whose attention stays in its local entries for the most part, so far as can be told without
    the logits of the far ones. Those are taken for normally distributed, as if far keys were, with mean μ and covariance Σ:

        local  ⇔  A_local / (A_local + A_far) ≥ threshold,    log A_far ≈ log T + scale·q·μ + scale²·qᵀΣq / 2,

    T being the number of far keys and ``A_local = Σ_local exp(scale·q·k_j)``. The attention of a local head sums to one over
    the local entries. Prompts are read in full. Nothing leaves the memory; what is saved is the time to read it, from
    texts on whose far entries outweigh the D² numbers of Σ and the local entries.

    Args:
        threshold: the share of a query's attention, from 0 to 1, that local entries must be expected to have: 0 never reads
            far ones, 1 always does.
        sinks: first tokens of a text.
        recent: its last ones, the query's own among them.

    μ and Σ, over each key head's far keys as they are in the cache (rotated), are those of the moment: a prompt's keys
    are merged in when its first answer token is decoded, then each token that leaves the window. Query heads that share
    a key head share these and decide for themselves; the key head is read if one of them wants it. A position bias in an
    additive mask is not part of the guess.

    Not found: the paper's threshold, which its curves vary; 0.9 is ours, and so is 1024 for ``recent``. Whether the
    paper's moments follow the text while it is written, or stay the prompt's, or another text's, could not be told.

    K. Donhauser et al. (2025), Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification.

    >>> import regard
    >>> print(regard.cache.QAdA(threshold=0.8))
    QAdA(threshold=0.8)
    """

    threshold: float = 0.9
    sinks: int = 16
    recent: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"QAdA: threshold must be a share from 0 to 1, got {self.threshold!r}")
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                f"QAdA: sinks must be at least 0 and recent at least 1, got sinks={self.sinks}, recent={self.recent}"
            )

    @property
    def local(self) -> tuple[int, int]:
        """How many first and last tokens are local."""
        return self.sinks, self.recent

    def step_call(self, layer: KeptLayer) -> type[KeptCall]:
        """One in which heads may do with the local entries, of a text that has others."""
        from regard.cache.kept_call import KeptCall
        from regard.cache.restricted_call import RestrictedCall

        return RestrictedCall if layer.seen > self.sinks + self.recent else KeptCall

    @property
    def rest(self) -> Rest:
        """Entries that a head does not read stay in memory."""
        return Unread()

    def is_local(self, step: Step) -> Tensor:
        """(batch, key heads, shared): whether local entries have the threshold's share, by the moments of the far keys."""
        mean, scatter, number = self._moments(step)
        number = number[:, None, None]
        variance = ((step.query @ scatter) * step.query).sum(dim=-1) / number.clamp(min=1)
        far = number.log() + (step.query @ mean[..., None])[..., 0] + variance / 2
        return step.mass - far >= torch.logit(step.mass.new_tensor(self.threshold))

    def _moments(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, Hk, D), scatter (B, Hk, D, D) around it and number (B,) of the far keys.

        The keys that came since the last step are merged in as T. Chan et al. (1979) merge samples: sums of squares
        themselves would lose their digits where the mean is large, as it is of keys.
        """
        state, (batch, heads, tokens, width) = step.state, step.keys.shape
        if not state:
            state["end"] = step.first.new_zeros(batch)  # the same for all texts: where the keys end that are merged in
            state["mean"] = step.query.new_zeros(batch, heads, width)
            state["scatter"] = step.query.new_zeros(batch, heads, width, width)
        begin, end = int(state["end"][0]), tokens - self.recent
        far = torch.arange(begin, end, device=step.keys.device) >= step.first[:, None] + self.sinks
        mean, scatter, added = _moments(step.keys[:, :, begin:end].to(step.query.dtype), far)
        before = (begin - self.sinks - step.first).clamp(min=0).to(added.dtype)
        number = before + added
        share = (added / number.clamp(min=1))[:, None, None]
        apart = mean - state["mean"]
        state["end"] = torch.full_like(state["end"], end)
        state["mean"] = state["mean"] + share * apart
        outer = apart[..., None] * apart[..., None, :]
        state["scatter"] = state["scatter"] + scatter + (share * before[:, None, None])[..., None] * outer
        return state["mean"], state["scatter"], number


def _moments(keys: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, scatter around it and number of the chosen (B, n) among keys (B, Hk, n, D)."""
    number = chosen.sum(dim=1).to(keys.dtype)
    weight = chosen.to(keys.dtype)[:, None, :, None]
    mean = (keys * weight).sum(dim=2) / number.clamp(min=1)[:, None, None]
    apart = (keys - mean[:, :, None]) * weight
    return mean, apart.mT @ apart, number
