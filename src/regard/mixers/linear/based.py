"""Based: linear attention whose features are a Taylor series of the exponential, beside sliding-window attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, functional

from regard.mixers.dynamical_system import DynamicalSystem, of_features
from regard.mixers.forms import Form, check_form, check_heads, initial_state
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._second_order import CHUNK, second_order_sums
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.softmax.sliding_window import SlidingWindow, check_window
from regard.mixers.value_mixer import ValueMixer

_PAPER = (
    "S. Arora et al. (2024), Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff, "
    "ICML, arXiv 2402.18668"
)
_SMALLEST = 1e-6  # a real token's weights sum to at least 1/2; padding's sum to 0


def taylor_width(dim: int) -> int:
    """Features of a query of F dimensions: ``1 + F + F (F + 1) / 2``.

    >>> taylor_width(16)
    153
    """
    return 1 + dim + dim * (dim + 1) // 2


def taylor_features(x: Tensor) -> Tensor:
    """Features (…, 1 + F + F (F+1)/2) of x (…, F), with ``φ(q)·φ(k) = 1 + a + a²/2`` for ``a = q·k / √F``.

    ``[1, x_i / F^¼, x_i² / √(2F), x_i x_j / √F for i < j]``: each product of two dimensions once, where the paper's
    outer product has it twice, divided by √2; the products of queries and keys are the same, and the state is half as large.

    >>> import torch
    >>> q, k = torch.randn(2, 5, 16)
    >>> a = (q * k).sum(-1) / 4
    >>> bool(torch.allclose((taylor_features(q) * taylor_features(k)).sum(-1), 1 + a + a**2 / 2, atol=1e-4))
    True
    """
    width = x.shape[-1]
    if not width:
        raise ValueError(f"there are no dimensions to take features of: x is of shape {tuple(x.shape)}")
    scaled = x * width**-0.25
    first, second = torch.triu_indices(width, width, offset=1, device=x.device)
    products = scaled[..., first] * scaled[..., second]
    return torch.cat([torch.ones_like(x[..., :1]), scaled, scaled.square() * 0.5**0.5, products], dim=-1)


def taylor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = True,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``o_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,  w_ij = 1 + a_ij + a_ij²/2,  a_ij = q_i·k_j / √F``.

    The second-order Taylor series of softmax attention's exponential. ``w = ((a + 1)² + 1) / 2`` is at least ½, so that
    the sum below the line is never small.

    Args:
        query, key: (B, H, N, F); without causal=True, keys and values may be of another number of tokens.
        value: (B, H, N, Dv).
        state: ``Σ φ(k) [v, 1]ᵀ`` before the first token, (B, H, 1 + F + F (F+1)/2, Dv + 1); zeros by default.
        mask: (B, N), false for padding, which no token sees.
        causal: else each token sees all.
        form: as in `linear_attention`, of which this is an instance.
        chunk: tokens of a chunk; where there are more, the features of each are computed again in the backward pass.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and the state after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit; a state where nothing is causal.

    S. Arora et al. (2024), Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> y, state = taylor_attention(q, k, v)
    >>> y.shape, state.shape
    (torch.Size([1, 2, 50, 8]), torch.Size([1, 2, 45, 9]))
    """
    check_form(form)
    check_heads(query, key, value, cross=not causal)
    check_window(1, key, mask)
    dtype = torch.promote_types(value.dtype, torch.float32)
    counted = torch.cat([value.to(dtype), value.new_ones(*value.shape[:3], 1, dtype=dtype)], dim=-1)
    if mask is not None:
        counted = counted * mask[:, None, :, None]
    q, k = query.to(dtype), key.to(dtype)
    if form == "chunked" and causal:
        width = q.shape[3]
        before = initial_state(state, q.new_empty(*q.shape[:3], taylor_width(width)), counted)
        scale = width**-0.25
        sums, after = second_order_sums(q * scale, k * scale, counted, before, _pairs(width, q.device), chunk)
    else:
        features = taylor_features(q), taylor_features(k)
        sums, after = linear_attention(*features, counted, state=state, causal=causal, form=form, chunk=chunk)
    return _divided(sums).to(value.dtype), after


def read_taylor(query: Tensor, memory: Tensor) -> Tensor:
    """What queries (B, H, N, F) find in what is remembered of other tokens, (B, H, 1 + F + F (F+1)/2, Dv + 1)."""
    return _divided(taylor_features(query.to(memory.dtype)) @ memory)


def _divided(sums: Tensor) -> Tensor:
    return sums[..., :-1] / sums[..., -1:].clamp(min=_SMALLEST)


def _pairs(width: int, device: torch.device) -> Tensor:
    """The pairs of dimensions whose products are features, in their order."""
    squares = torch.arange(width, device=device).expand(2, -1)
    return torch.cat([squares, torch.triu_indices(width, width, offset=1, device=device)], dim=1)


class TaylorAttention(ValueMixer):
    """Based's linear layer: `taylor_attention` of queries and keys of few dimensions, without norms or positions.

    Its state is ``(1 + F + F (F+1)/2) (dim + heads)`` numbers for each text.

    Args:
        dim: of the tokens.
        heads: that divide it.
        features: F, dimensions of a head's queries and keys.
        causal: else each token sees all, and no call goes on from a state.

    S. Arora et al. (2024), Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff.

    >>> import torch
    >>> y, state = TaylorAttention(32, heads=4, features=8)(torch.randn(2, 10, 32))
    >>> y.shape, state.tensors["memory"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 45, 9]))
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="o_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,  w = 1 + a + a²/2,  a = q·k/√F",
        time="O(N F² D)",
        state="(1 + F + F(F+1)/2)(D + H)",
        bidirectional=True,
        cross=True,
    )

    def __init__(self, dim: int, heads: int = 4, features: int = 16, *, causal: bool = True) -> None:
        super().__init__(dim)
        self.causal = causal
        name = type(self).__name__
        check_divides(name, dim, heads)
        if features < 1:
            raise ValueError(f"{name}: features must be at least 1, got {features}")
        self.heads, self.features = heads, features
        self.q_proj, self.k_proj = (Linear(dim, heads * features, bias=False) for _ in range(2))
        self.v_proj = Linear(dim, dim, bias=False)
        self.o_proj = Linear(dim, dim, bias=False)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries, keys and values, those of the context where there is one."""
        (query,) = heads_of(x, self.heads, self.q_proj)
        if layout.cross and layout.context is None:  # the state has all of it
            return Projected(query[..., :0], {"query": query})
        key, value = heads_of(x if layout.context is None else layout.context, self.heads, self.k_proj, self.v_proj)
        return Projected(value, {"query": query, "key": key})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The Taylor series of softmax attention."""
        memory = None if state is None else state["memory"]
        query = projected["query"]
        if layout.cross and memory is not None:
            return read_taylor(query, memory).to(query.dtype), {"memory": memory}
        mask = layout.context_mask if layout.cross else layout.mask
        mixed, after = taylor_attention(query, projected["key"], projected.value, memory, mask, causal=layout.causal)
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The output's projection."""
        y: Tensor = self.o_proj(join_heads(mixed))
        return y

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count, with values of zero."""
        counts = state["memory"][..., -1:]
        return {"memory": torch.cat([counts.new_zeros(*counts.shape[:3], width), counts], dim=-1)}

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = 1, b = φ(k), c = φ(q) / Σ_j φ(q)·φ(k_j)``."""
        self._check_causal()
        projected = self.project(x)
        return of_features(taylor_features(projected["query"]), taylor_features(projected["key"]), _SMALLEST)


class Based(ValueMixer):
    """Both of Based's attentions side by side: ``y = TaylorAttention(x) + SlidingWindow(x)``.

    The window recalls recent tokens exactly, the Taylor series all of them approximately. Window and features dial the state:
    ``(1 + F + F (F+1)/2) (dim + heads) + 2 (window − 1) dim`` numbers for each text, and ``window − 1`` flags.

    The paper's models put the two into layers that follow one another, one fifth of the layers each, between gated
    convolutions; to be one mixer, they are summed here, and the gated convolutions are left out.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        features: F, dimensions of the queries and keys of a linear head.
        window: tokens that each sees exactly, itself among them.

    S. Arora et al. (2024), Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff.

    >>> import torch
    >>> mixer = Based(32, heads=4, features=8, window=16)
    >>> y, state = mixer(torch.randn(1, 40, 32))
    >>> numbers = sum(t.numel() for t in state.tensors.values() if t.is_floating_point())
    >>> numbers == 45 * (32 + 4) + 2 * 15 * 32
    True
    """

    facts: ClassVar[Facts] = Facts(
        paper=_PAPER,
        formula="y = W₁ taylor_attention(x) + W₂ sliding_window_attention(x)",
        time="O(N (F² + W) D)",
        state="(1 + F + F(F+1)/2)(D + H) + 2 (W − 1) D",
    )

    def __init__(self, dim: int, heads: int = 4, features: int = 16, window: int = 64) -> None:
        super().__init__(dim)
        self.linear = TaylorAttention(dim, heads, features)
        self.window = SlidingWindow(dim, heads, window)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Those of both, the linear heads' values before those of the window."""
        far, near = self.linear.project(x, state, layout), self.window.project(x, state, layout)
        parts = {f"linear.{name}": part for name, part in far.parts.items()}
        parts |= {f"window.{name}": part for name, part in near.parts.items()}
        return Projected(torch.cat([far.value, near.value], dim=1), parts)

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both; the names in their states differ."""
        halves = []
        after: dict[str, Tensor] = {}
        for part, value in zip(("linear", "window"), projected.value.chunk(2, dim=1), strict=True):
            mixer: TaylorAttention | SlidingWindow = getattr(self, part)
            mixed, held = mixer.combine(_half(projected, part, value), state, layout)
            halves.append(mixed)
            after |= held
        return torch.cat(halves, dim=1), after

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The sum of the two."""
        far, near = mixed.chunk(2, dim=1)
        return self.linear.out(far, projected) + self.window.out(near, projected)

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count in both, with values of zero."""
        return {**self.linear.without_values(state, width), **self.window.without_values(state, width)}

    def queries(self, projected: Projected) -> int:
        """N, the tokens of the call."""
        return projected["window.query"].shape[2]

    def system(self, x: Tensor) -> DynamicalSystem:
        """Those of both, heads as in `map`, the smaller state filled up with zeros."""
        both = self.linear.system(x), self.window.system(x)
        size = max(half.state_size for half in both)
        transition, into, out = zip(*(_filled(half, size) for half in both), strict=True)
        return DynamicalSystem(torch.cat(transition, dim=1), torch.cat(into, dim=1), torch.cat(out, dim=1))


def _half(projected: Projected, part: str, value: Tensor) -> Projected:
    """What one of the two made."""
    prefix = f"{part}."
    parts = {name.removeprefix(prefix): of for name, of in projected.parts.items() if name.startswith(prefix)}
    return Projected(value, parts)


def _filled(system: DynamicalSystem, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A transition that all tokens share, as whole matrices of each head, and b and c, of a state of this size."""
    extra = size - system.state_size
    whole = system.transition if system.transition.ndim == 5 else system.transition.diag_embed()
    transition = functional.pad(whole, (0, extra, 0, extra)).expand(-1, system.into.shape[1], -1, -1, -1)
    return transition, functional.pad(system.into, (0, extra)), functional.pad(system.out, (0, extra))
