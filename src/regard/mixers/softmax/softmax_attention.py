"""Softmax attention: the reference with which all others are compared."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from regard.maps import AttentionMap
from regard.mixers.mixer import Facts
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.softmax.key_values import KeyValueMixer, KeyValues
from regard.mixers.state import State


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

    def attend(self, seen: KeyValues) -> Tensor:
        """The fused call; with its own flag for causal calls where no mask is needed."""
        mask, causal = visible_keys(seen, self.causal)
        return functional.scaled_dot_product_attention(
            seen.query, seen.key, seen.value, attn_mask=mask, is_causal=causal
        )

    def map(self, x: Tensor, state: State | None = None) -> AttentionMap:
        """The softmax map of the tokens over the keys so far, (B, H, N, M)."""
        seen = self.see(x, None if state is None else state.tensors, None)
        mask, causal = visible_keys(seen, self.causal)
        return AttentionMap(seen.query, seen.key, attn_mask=mask, is_causal=causal)


def visible_keys(seen: KeyValues, causal: bool) -> tuple[Tensor | None, bool]:
    """What SDPA must be told for queries that are the last tokens of the keys: a mask, or that the call is causal."""
    queries, keys = seen.query.shape[2], seen.key.shape[2]
    if not causal:
        if seen.real is None:
            return None, False
        own = torch.eye(queries, keys, dtype=torch.bool, device=seen.query.device)  # padding, so that no row is empty
        return seen.real[:, None, None] | own & ~seen.real[:, None, :, None], False
    if seen.real is None and (queries == 1 or queries == keys):
        return None, queries == keys
    ones = torch.ones(queries, keys, dtype=torch.bool, device=seen.query.device)
    earlier = ones.tril(keys - queries)
    if seen.real is None:
        return earlier, False
    own = earlier & ~earlier.tril(-1 + keys - queries)  # padding sees itself, so that no row is empty
    return (earlier & seen.real[:, None, None]) | own, False
