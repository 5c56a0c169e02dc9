"""Softmax attention to the last few tokens and to learned ones before all of them, which every token sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Linear, Module

from regard.mixers.forms import cut
from regard.mixers.mixer import heads_of, join_heads
from regard.mixers.rotary import rotary_rates, rotate
from regard.mixers.softmax.sliding_window import distances, join, windows

_ROTARY = 10_000.0


def prefixed_attention(
    query: Tensor, rotated: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], seen: Tensor
) -> Tensor:
    """Attention to tokens, by rotated queries and keys, and to a prefix, which has no position, by the queries as they are.

    Args:
        query, rotated: (..., n, D).
        key, value: of the tokens, (..., m, D), keys rotated.
        prefix: keys and values, (..., P, D).
        seen: (..., n, m), true where a query sees a token.

    Returns:
        (..., n, D).
    """
    scale = query.shape[-1] ** -0.5
    near = (scale * rotated @ key.mT).masked_fill(~seen, -torch.inf)
    weights = torch.cat([scale * query @ prefix[0].mT, near], dim=-1).softmax(-1)
    first = prefix[0].shape[-2]
    return weights[..., :first] @ prefix[1] + weights[..., first:] @ value


class PrefixedWindow(Module):
    """Sliding-window attention of each head, after a prefix (P, dim) that is projected as tokens are; rotary positions.

    The state is the last ``window − 1`` tokens: ``key`` and ``value`` (B, H, window − 1, D), ``real`` (B, window − 1).

    >>> import torch
    >>> attention, x, prefix = PrefixedWindow(16, heads=2, window=4), torch.randn(1, 9, 16), torch.randn(3, 16)
    >>> whole, _ = attention(x, prefix)
    >>> first, state = attention(x[:, :5], prefix)
    >>> rest, _ = attention(x[:, 5:], prefix, state)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5))
    True
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = Linear(dim, dim, bias=False)

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values (B, H, N, D), of tokens (B, N, dim)."""
        return heads_of(x, self.heads, self.q_proj, self.k_proj, self.v_proj)

    def rotate(self, x: Tensor, first: int) -> Tensor:
        """Queries or keys (B, H, N, D) at positions ``first`` and on."""
        positions = torch.arange(first, first + x.shape[2], device=x.device)[None]
        return rotate(x, positions, rotary_rates(x.shape[3], _ROTARY, x.device))

    def forward(
        self, x: Tensor, prefix: Tensor, state: Mapping[str, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mixed tokens (B, N, dim), and the state after them; padding comes first, as in `Mixer.mix`."""
        query, key, value = self.project(x)
        _, *kept = (tensor[:, :, None] for tensor in self.project(prefix[None]))  # one block, for all
        batch, heads, length, width = query.shape
        empty = key.new_zeros(batch, heads, self.window - 1, width)
        none = torch.zeros(batch, self.window - 1, dtype=torch.bool, device=x.device)
        before = {"key": empty, "value": empty, "real": none} if state is None else state
        keys, values, real = join(before["real"], mask, (before["key"], key), (before["value"], value))
        after = {"key": keys[:, :, length:], "value": values[:, :, length:], "real": real[:, length:]}
        size = min(length, max(self.window, 1))
        distance = distances(size, self.window, x.device)
        seen = windows(real[:, None, :, None], size, self.window).mT | (distance == 0)  # so that no row is empty
        mixed = prefixed_attention(
            cut(query, size), cut(self.rotate(query, self.window - 1), size),
            windows(self.rotate(keys, 0), size, self.window), windows(values, size, self.window),
            (kept[0], kept[1]), seen & (distance >= 0) & (distance < self.window),
        )  # fmt: skip
        y: Tensor = self.o_proj(join_heads(mixed.reshape(batch, heads, -1, width)[:, :, :length]))
        return y, after
