"""Keys without the channels that queries do not use."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.cache.around import Around
from regard.cache.policy import Entries, Reads
from regard.cache.rest import Rest

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer


@dataclass(frozen=True, kw_only=True)
class ThinK(Around):
    """Keep of the entries that another policy keeps the best channels of their keys:

    ``score_c = mean_h mean_{i in window} q_ic² · mean_j k_jc²``, h being the query heads of a group, j the entries that stay.

    The channels are chosen for each head when entries are first chosen, and are held alone: the cache is really smaller. A
    step multiplies them with those of its query. Other channels are read as zeros.

    Args:
        policy: which entries stay, and when; with ``budget=1.0`` all.
        channels: how many of a key's channels stay: a number of them, or a share.
        window: the last tokens, whose queries count, and whose keys stay whole.

    Raises:
        ValueError: channels that are no number from 1 and no share; more of them than keys have, when it reads; no window.
        NotImplementedError: while the model runs, one that caches latents (DeepSeek's MLA), not keys.

    Y. Xu et al. (2024), ThinK: Thinner Key Cache by Query-Driven Pruning.

    >>> import torch, regard
    >>> model, tokenizer = regard.mini()
    >>> policy = regard.cache.ThinK(regard.cache.SnapKV(budget=0.5, window=16), channels=0.25, window=16)
    >>> with torch.no_grad(), regard.compress(model, policy) as cache:
    ...     _ = model(torch.arange(10, 266)[None])
    >>> print(f"{cache.report().kept}, {cache.report().bytes / cache.report().full_bytes:.2f} of the bytes")
    0.5, 0.34 of the bytes
    """

    channels: int | float = 0.5
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.channels, int) and not isinstance(self.channels, bool)
        if not (whole and self.channels >= 1) and not (isinstance(self.channels, float) and 0 < self.channels <= 1):
            raise ValueError(f"ThinK: channels must be a number of them or a share above 0, got {self.channels!r}")
        if self.window < 1:
            raise ValueError(f"ThinK: window must be at least 1 token, got {self.window}")

    @property
    def rest(self) -> Rest:
        """What the policy within makes of the rest, and then fewer channels of what stays."""
        return _Narrow(self.policy.rest, self.channels, self.window)

    @property
    def reads(self) -> Reads:
        """What the policy within goes by, and the queries of the window."""
        reads = self.policy.reads
        return replace(reads, queries=max(reads.queries, self.window))

    def score(self, entries: Entries) -> Tensor:
        """As of the policy within."""
        return self.inner(entries)


@dataclass(frozen=True)
class _Narrow(Rest):
    """Fewer channels of what stays after another rest."""

    rest: Rest
    channels: int | float
    window: int

    @property
    def frees(self) -> bool:  # type: ignore[override]
        """As the rest within."""
        return self.rest.frees

    @property
    def reads(self) -> int:  # type: ignore[override]
        """As the rest within."""
        return self.rest.reads

    def apply(self, layer: KeptLayer, entries: Entries, scores: Tensor, counts: Tensor, in_order: bool) -> None:
        """Have the layer keep what is to stay, and then the channels that it has kept before, or the best now."""
        if layer.is_latent:
            raise NotImplementedError(
                "ThinK leaves out channels of keys, which a model that caches latents does not keep"
            )
        self.rest.apply(layer, entries, scores, counts, in_order=True)
        if "channels" not in layer.state:
            layer.state["channels"] = self._best(layer, entries)
        layer.narrow(layer.state["channels"], self.window)

    def _best(self, layer: KeptLayer, entries: Entries) -> Tensor:
        """(batch, key heads, channels that stay), in their order."""
        given, (batch, heads, _, width) = entries.module_call, entries.keys.shape
        number = self.channels if isinstance(self.channels, int) else math.ceil(width * self.channels - 1e-9)
        if number > width:
            raise ValueError(f"ThinK: channels={number}, but the keys of {given.call.place.path} have {width}")
        ranks = given.query_ranks
        read = (ranks >= (entries.tokens - self.window)[:, None]) & (ranks >= 0)
        share = (read / read.sum(dim=1, keepdim=True))[:, None, :, None]
        of_queries = (given.queries.float() ** 2 * share).sum(dim=2).unflatten(1, (heads, -1)).mean(dim=2)
        of_keys = torch.zeros(batch, heads, width, device=of_queries.device)
        for group in layer.groups:
            positions = group.all_positions()
            real = positions >= 0
            if entries.text is not None:
                text = entries.text[:, None].expand(-1, len(group.heads), -1)
                real = real & text.gather(2, positions.clamp(min=0))
            squares = (group.whole_keys().float() ** 2 * real[..., None]).sum(dim=2)
            of_keys[:, group.heads] = squares / real.sum(dim=2).clamp(min=1)[..., None]
        channels: Tensor = (of_queries * of_keys).topk(number, dim=2).indices.sort(dim=2).values
        return channels
