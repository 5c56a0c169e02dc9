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
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._second_order import CHUNK, second_order_sums
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.value_mixer import ValueMixer

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
        query, key: (B, H, N, Dk), normalised by the caller; without causal=True, keys and values may be of another number of
            tokens.
        value: (B, H, N, Dv).
        state: the sum of φ(k) (v, 1)ᵀ before the first token, (B, H, F, Dv + 1); zeros by default.
        order: 1 or 2.
        mask: (B, N), false for keys that do not count.
        causal: else each token sees all.
        form: "parallel" the matrix of all pairs by f itself, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens of a chunk; where there are more, the features of each are computed again in the backward pass: those
            of a whole text would be F / Dk times as large as its keys.

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
    check_heads(query, key, value, cross=not causal)
    _check(key, value, state, order, mask, causal)
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


def read_fast(query: Tensor, memory: Tensor, order: Order) -> Tensor:
    """What queries (B, H, N, Dk) find in what is remembered of other tokens, (B, H, F, Dv + 1)."""
    return _divided(factors(query.to(memory.dtype), order) @ memory)


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
        scale = torch.where(first == second, x.new_tensor(math.sqrt(0.5)), x.new_ones(()))
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


def _check(key: Tensor, value: Tensor, state: Tensor | None, order: int, mask: Tensor | None, causal: bool) -> None:
    batch, heads, length, width = key.shape
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


class FAST(ValueMixer):
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
        state="(1 + F + F(F+1)/2)(D + H), F = D/H",
        bidirectional=True,
        cross=True,
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

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries and keys, normalised and turned, and values; those of the context where there is one, not turned."""
        (query,) = heads_of(x, self.heads, self.q_proj)
        query = normalized(query, self.order)
        if layout.cross:
            return self._of_context(query, layout)
        key, value = heads_of(x, self.heads, self.k_proj, self.v_proj)
        real = torch.ones_like(x[..., 0], dtype=torch.long) if layout.mask is None else layout.mask.long()
        count = x.new_zeros(len(x), dtype=torch.long) if state is None else state["count"]
        key, after = normalized(key, self.order), {"count": count + real.sum(1)}
        if self.rotary is None:
            return Projected(value, {"query": query, "key": key}, after)
        positions = real.cumsum(1) - 1 + count[:, None]
        rates = rotary_rates(query.shape[3], self.rotary, x.device)
        parts = {"query": rotate(query, positions, rates), "key": rotate(key, positions, rates)}
        return Projected(value, parts, after)

    def _of_context(self, query: Tensor, layout: Layout) -> Projected:
        """Keys and values of a context, which has no place among the tokens; none where the state has them."""
        if layout.context is None:
            return Projected(query[..., :0], {"query": query})
        key, value = heads_of(layout.context, self.heads, self.k_proj, self.v_proj)
        return Projected(value, {"query": query, "key": normalized(key, self.order)})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """FAST in the place of the softmax."""
        memory = None if state is None else state["memory"]
        query = projected["query"]
        if layout.cross and memory is not None:
            return read_fast(query, memory, self.order).to(query.dtype), {"memory": memory}
        mixed, after = fast_attention(
            query, projected["key"], projected.value, memory, order=self.order,
            mask=layout.context_mask if layout.cross else layout.mask, causal=layout.causal,
        )  # fmt: skip
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The output's projection."""
        y: Tensor = self.o_proj(join_heads(mixed))
        return y

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count, with values of zero."""
        memory = state["memory"]
        return {"memory": torch.cat([memory.new_zeros(*memory.shape[:3], width), memory[..., -1:]], dim=-1)}

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = 1, b = φ(k), c = φ(q) / Σ_j φ(q)·φ(k_j)``."""
        self._check_causal()
        projected = self.project(x)
        return of_features(factors(projected["query"], self.order), factors(projected["key"], self.order), _LEAST)
