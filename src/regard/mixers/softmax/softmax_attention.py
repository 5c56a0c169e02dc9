"""Softmax attention: the reference with which all others are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from regard.maps import AttentionMap
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import Facts
from regard.mixers.projected import Projected
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.softmax.key_values import KeyValueMixer


class SoftmaxAttention(KeyValueMixer):
    """Plain multi-head attention, ``o_i = Σ_{j≤i} softmax_j(q_i·k_j / √d) v_j``, by PyTorch's fused kernels.

    Rotary positions count the real tokens of a text, over all calls. The state is every key, turned, and every value,
    and grows with the text.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each where there are rotary positions.
        rotary: the base of rotary positions, or None for none.
        causal: else each token sees all, and no call goes on from a state.

    Raises:
        ValueError: heads that do not divide the width, or odd head dimensions with rotary positions.

    A. Vaswani et al. (2017), Attention Is All You Need; J. Su et al. (2021), RoFormer.

    >>> import torch
    >>> mixer, x = SoftmaxAttention(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, state.tensors["key"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 11, 8]))
    >>> mixer.map(x).entropy().shape
    torch.Size([2, 4, 10])
    """

    facts: ClassVar[Facts] = Facts(
        paper="A. Vaswani et al. (2017), Attention Is All You Need",
        formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j",
        time="O(N² D)",
        state="2 N D",
        bidirectional=True,
        cross=True,
        exact=True,
    )

    def __init__(self, dim: int, heads: int = 4, rotary: float | None = 10_000.0, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal)
        if rotary is not None:
            check_rotary(type(self).__name__, dim, heads)
        self.rotary = rotary

    def place(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned."""
        if self.rotary is None:
            return query, key, value
        rates = rotary_rates(query.shape[3], self.rotary, query.device)
        return rotate(query, positions, rates), rotate(key, positions, rates), value

    @property
    def hides_map(self) -> bool:
        """Its matrix is that of a call of attention, and is seen there."""
        return False

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The fused call; with its own flag for causal calls where no mask is needed."""
        mask, causal = visible_keys(projected, layout)
        return functional.scaled_dot_product_attention(
            projected["query"], projected["key"], projected.value, attn_mask=mask, is_causal=causal
        ), {}

    def map_of(self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout) -> AttentionMap:
        """The softmax map of the tokens over the keys so far, (B, H, N, M)."""
        mask, causal = visible_keys(projected, layout)
        return AttentionMap(projected["query"], projected["key"], attn_mask=mask, is_causal=causal)


def visible_keys(projected: Projected, layout: Layout) -> tuple[Tensor | None, bool]:
    """What SDPA must be told for queries that are the last tokens of the keys: a mask, or that the call is causal."""
    real, device = projected.get("real"), projected.value.device
    queries, keys = projected["query"].shape[2], projected["key"].shape[2]
    if not layout.causal:
        if real is None:
            return None, False
        if layout.cross:
            return real[:, None, None].expand(-1, -1, queries, -1), False
        own = torch.eye(queries, keys, dtype=torch.bool, device=device)  # padding, so that no row is empty
        return real[:, None, None] | own & ~real[:, None, :, None], False
    if real is None and (queries == 1 or queries == keys):
        return None, queries == keys
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if real is None:
        return earlier, False
    own = earlier & ~earlier.tril(-1 + keys - queries)  # padding sees itself, so that no row is empty
    return (earlier & real[:, None, None]) | own, False
