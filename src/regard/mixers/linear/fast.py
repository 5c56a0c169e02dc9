"""FAST: attention with a polynomial in place of the exponential, which factorises into features of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Linear, functional

from regard.mixers.dynamical_system import DynamicalSystem, of_features
from regard.mixers.forms import Form, check_form, check_heads
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._second_order import CHUNK, second_order_sums
from regard.mixers.mixer import Facts, Mixer, check_divides, heads_of, join_heads
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.state import State

Order = Literal[1, 2]
_LEAST = 1e-6


def fast_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    *,
    order: Order = 2,
    mask: Tensor | None = None,
    causal: bool = True,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``o_i = Σ_j f(q_i·k_j) v_j / Σ_j f(q_i·k_j)``, with ``f(s) = 1 + s`` or ``1 + s + s²/2``.

    ``f(q·k) = φ(q)·φ(k)`` with the features of `factors`, so that numerator and denominator are linear attention, the
    denominator with values of 1. Of order 2, f is at least ½ and all weights are positive; of order 1 they are where
    queries and keys are no longer than 1. `normalized` brings them to where either is well.

    Args:
        query, key: (B, H, N, Dk), normalised by the caller.
        value: (B, H, N, Dv).
        state: the sum of φ(k) (v, 1)ᵀ before the first token, (B, H, F, Dv + 1); zeros by default.
        order: 1 or 2.
        mask: (B, N), false for keys that do not count.
        causal: else each token sees all.
        form: "parallel" the matrix of all pairs by f itself, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens of a chunk; where there are more, the features of each are computed again in the backward pass: those of a
            whole text would be F / Dk times as large as its keys.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit, another order, a state where nothing is causal.

    A. Gerami et al. (2024), FAST: Factorizable Attention for Speeding up Transformers.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 8)
    >>> q, k = normalized(q), normalized(k)
    >>> chunked, state = fast_attention(q, k, v)
    >>> parallel, _ = fast_attention(q, k, v, form="parallel")
    >>> bool(torch.allclose(chunked, parallel, atol=1e-4)), state.shape
    (True, torch.Size([1, 2, 45, 9]))
    """
    check_form(form)
    check_heads(query, key, value)
    _check(query, value, state, order, mask, causal)
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if mask is not None:
        v = v * mask[:, None, :, None]
    before = None if state is None else state.to(dtype)
    if form == "parallel" or not causal:
        sums, after = _whole(q, k, v, before, order, causal, dense=form == "parallel")
    elif form == "recurrent" or order == 1:
        sums, after = linear_attention(factors(q, order), factors(k, order), v, state=before, form=form, chunk=chunk)
    else:
        features = _features(order, q.shape[3])
        before = v.new_zeros(*v.shape[:2], features, v.shape[3]) if before is None else before
        pairs = torch.triu_indices(q.shape[3], q.shape[3], device=q.device)
        sums, after = second_order_sums(q, k, v, before, pairs, chunk)
    return _divided(sums).to(value.dtype), after


def factors(x: Tensor, order: Order) -> Tensor:
    """``φ(x)`` with ``φ(x)·φ(y) = f(x·y)``: 1, x, and of order 2 each ``x_a² / √2`` and ``x_a x_b``, a < b.

    >>> import torch
    >>> x, y = torch.randn(2, 8, dtype=torch.float64)
    >>> s = x @ y
    >>> bool(torch.isclose(factors(x, 2) @ factors(y, 2), 1 + s + s**2 / 2))
    True
    """
    parts = [torch.ones_like(x[..., :1]), x]
    if order == 2:
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        scale = torch.where(first == second, math.sqrt(0.5), 1.0).to(x.dtype)
        parts.append(x[..., first] * x[..., second] * scale)
    return torch.cat(parts, dim=-1)


def normalized(x: Tensor, order: Order = 2) -> Tensor:
    """Each token by itself without its mean, and then of length 1 for order 1, of length D^¼ for order 2.

    That is a layer norm without parameters, scaled: products q·k lie between −1 and 1, or between −√D and √D.

    >>> import torch
    >>> normalized(torch.randn(5, 16)).norm(dim=-1).allclose(torch.tensor(2.0), rtol=1e-3)
    True
    """
    width = x.shape[-1]
    unit = functional.layer_norm(x, (width,)) / math.sqrt(width)
    return unit if order == 1 else unit * width**0.25


def _features(order: int, width: int) -> int:
    return 1 + width + (width * (width + 1) // 2 if order == 2 else 0)


def _divided(sums: Tensor) -> Tensor:
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    return numerator / denominator.clamp(min=_LEAST)


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    before: Tensor | None,
    order: Order,
    causal: bool,
    dense: bool,
) -> tuple[Tensor, Tensor]:
    """All pairs by f itself, or one sum of all keys."""
    after = factors(k, order).mT @ v
    if not dense:
        return factors(q, order) @ after, after
    scores = q @ k.mT
    matrix = 1 + scores + (scores.square() / 2 if order == 2 else 0.0)
    sums = (matrix.tril() if causal else matrix) @ v
    if before is not None:
        sums, after = sums + factors(q, order) @ before, after + before
    return sums, after


def _check(
    query: Tensor, value: Tensor, state: Tensor | None, order: int, mask: Tensor | None, causal: bool
) -> None:
    batch, heads, length, width = query.shape
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
        raise ValueError(f"mask must be boolean, of shape {(batch, length)}, got {mask.dtype} {tuple(mask.shape)}")
    if state is None:
        return
    if not causal:
        raise ValueError("without causal=True there is no state to begin with: every token sees all others")
    shape = (batch, heads, _features(order, width), value.shape[3] + 1)
    if state.shape != shape:
        raise ValueError(f"the state must be of shape {shape}, got {tuple(state.shape)}")


class FAST(Mixer):
    """Multi-head attention with FAST in the softmax's place, with rotary positions.

    The paper's own normalisation divides by a maximum over all tokens, which would look ahead; here each token is normalised
    by itself (see `normalized`), and turned after that, which keeps its length, so that the bounds hold and distances alone
    matter.

    Args:
        dim: of the tokens.
        heads: that divide it; the state has about (D/H)²/2 features of each for order 2, so that more heads are cheaper.
        order: 1 or 2.
        rotary: the base of rotary positions, or None for none.
        causal: else each token sees all, and no call goes on from a state.

    Raises:
        ValueError: heads that do not divide the width, odd head dimensions with rotary positions, another order.

    A. Gerami et al. (2024), FAST: Factorizable Attention for Speeding up Transformers.

    >>> import torch
    >>> mixer, x = FAST(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> y.shape, state.tensors["memory"].shape, mixer.map(x).dense().sum(-1).allclose(torch.ones(1))
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 45, 9]), True)
    """

    facts: ClassVar[Facts] = Facts(
        paper="A. Gerami et al. (2024), FAST: Factorizable Attention for Speeding up Transformers",
        formula="o_i = Σ_j f(q_i·k_j) v_j / Σ_j f(q_i·k_j),  f(s) = 1 + s + s²/2",
        time="O(N D³/H²)",
        state="D³/(2 H²)",
        bidirectional=True,
    )

    def __init__(
        self, dim: int, heads: int = 4, order: Order = 2, rotary: float | None = 10_000.0, *, causal: bool = True
    ) -> None:
        super().__init__(dim)
        self.causal = causal
        name = type(self).__name__
        check_divides(name, dim, heads)
        if rotary is not None:
            check_rotary(name, dim, heads)
        if order not in (1, 2):
            raise ValueError(f"{name}: order must be 1 or 2, got {order}")
        self.heads, self.rotary = heads, rotary
        self.order: Order = order
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = Linear(dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Project, normalise, remember, read."""
        query, key, value = self._inputs(x, state, mask)
        before = None if state is None else state["memory"]
        mixed, after = fast_attention(query, key, value, before, order=self.order, mask=mask, causal=self.causal)
        number = x.shape[1] if mask is None else mask.sum(1)
        count = number + (x.new_zeros(len(x), dtype=torch.long) if state is None else state["count"])
        return self.o_proj(join_heads(mixed)), {"memory": after, "count": count}

    def map(self, x: Tensor, state: State | None = None) -> HiddenMap:
        """The normalised matrix; after a state, rows sum to less than 1 by what goes to the tokens before."""
        tensors = None if state is None else state.tensors
        query, key, value = self._inputs(x, tensors, None)
        batch, heads, tokens, _ = query.shape

        def apply(values: Tensor) -> Tensor:
            before = None
            if tensors is not None:  # of what came before, the share alone
                memory = tensors["memory"]
                before = torch.cat([memory.new_zeros(*memory.shape[:3], values.shape[3]), memory[..., -1:]], dim=-1)
            return fast_attention(query, key, values, before, order=self.order, causal=self.causal)[0]

        return HiddenMap(apply, (batch, heads, tokens, tokens), value)

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = 1, b = φ(k), c = φ(q) / Σ_j φ(q)·φ(k_j)``."""
        self._check_causal()
        query, key, _ = self._inputs(x, None, None)
        return of_features(factors(query, self.order), factors(key, self.order), _LEAST)

    def _inputs(
        self, x: Tensor, state: Mapping[str, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and turned, and values (B, H, N, D)."""
        query, key, value = heads_of(x, self.heads, self.q_proj, self.k_proj, self.v_proj)
        query, key = (normalized(tensor, self.order) for tensor in (query, key))
        if self.rotary is None:
            return query, key, value
        real = torch.ones_like(x[..., 0], dtype=torch.long) if mask is None else mask.long()
        positions = real.cumsum(1) - 1 + (0 if state is None else state["count"][:, None])
        rates = rotary_rates(query.shape[3], self.rotary, x.device)
        return rotate(query, positions, rates), rotate(key, positions, rates), value
