"""LightNet: linear attention whose decays come of an additive recurrence, so that one scan may also see all of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList, Parameter, RMSNorm, Sequential, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, check_heads
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._lrpe import positions_after, turn
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads, split_heads, without_weight_decay
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer

CHUNK = 64
NOTHING = -1e4
"""The logarithm of a sum of nothing: finite, for the gradients' sake."""

Sums = tuple[Tensor, Tensor]
"""S (B, H, Dk or 2 Dk, Dv), the values' mean by the keys' weights so far, and z (B, H, Dk), the log of the weights' sum."""


def lightnet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Sums | None = None,
    *,
    angles: Tensor | None = None,
    causal: bool = True,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Sums]:
    """``o_i = Σ_{j≤i} (q_i · e^{k_j} / Σ_{l≤i} e^{k_l}) v_j``: the keys' softmax over time, each channel by itself.

    As a recurrence ``z_i = log(e^{z_{i−1}} + e^{k_i})``, ``S_i = diag(e^{z_{i−1} − z_i}) S_{i−1} + e^{k_i − z_i} v_iᵀ``,
    ``o_i = S_iᵀ q_i``, in which no power exceeds 1: what decays is the share of the sum. Not causal, the sum is of all
    tokens, and one scan is all there is, whatever the order; so the paper is described, and its own equation of this case was
    not at hand.

    Args:
        query: (B, H, N, Dk).
        key: (B, H, N, Dk), logarithms of the weights; of −10⁴ or less, there is no such key.
        value: (B, H, N, Dv).
        state: S and z before the first token; none by default, so that the first token's weight is 1.
        angles: a, broadcastable to the keys, of each channel of each token: its product is then times
            ``cos(a_i − a_j)``, and S is twice as long. See `MDLRPE`.
        causal: else each token sees all.
        form: "parallel" the quadratic reference, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens of a chunk.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and S and z after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit; a state where nothing is causal.

    Z. Qin et al. (2024), You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> output, (memory, total) = lightnet(q, k, v)
    >>> bool(torch.allclose(memory, k.softmax(2).mT @ v, atol=1e-4))
    True
    """
    check_form(form)
    check_heads(query, key, value)
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
    turns = None if angles is None else _checked_angles(angles, k).to(dtype)
    if not causal:
        if state is not None:
            raise ValueError("without causal=True there is no state to begin with: every token sees all others")
        output, after = _one_scan(q, k, v, turns, form, chunk)
        return output.to(value.dtype), after
    before = None if state is None else _checked_state(state, k, v, turns)
    weights, decay, total = _shares(k, None if before is None else before[1])
    q, weights, decay = _turned(q, weights, decay, turns)
    memory = None if before is None else before[0]
    output, memory = linear_attention(q, weights, v, decay, memory, form=form, chunk=chunk)
    return output.to(value.dtype), (memory, total)


def _shares(key: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each key's share of the sum so far, the log of what is left of the others', and that of the sum at the end."""
    key = key.clamp(min=NOTHING)
    joined = key if before is None else torch.cat([before[:, :, None], key], dim=2)
    totals = joined.logcumsumexp(2)
    total = totals[:, :, -key.shape[2] :]
    former = totals[:, :, :-1] if before is not None else functional.pad(total[:, :, :-1], (0, 0, 1, 0), value=NOTHING)
    nothing = NOTHING / 2  # with nothing yet there is nothing to decay, and the difference would cost all precision
    decay = (former - total).masked_fill(former < nothing, 0.0)
    weights = (key - total).exp().masked_fill(key < nothing, 0.0)
    return weights, decay, total[:, :, -1]


def _turned(q: Tensor, k: Tensor, decay: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if angles is None:
        return q, k, decay
    return turn(q, angles), turn(k, angles), torch.cat([decay, decay], dim=-1)


def _one_scan(q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, form: Form, chunk: int) -> tuple[Tensor, Sums]:
    """What the last token of the recurrence would see, seen by all."""
    if form == "recurrent":
        _, (memory, total) = lightnet(q, k, v, angles=angles, form=form)
        return _turned(q, k, k, angles)[0] @ memory, (memory, total)
    k = k.clamp(min=NOTHING)
    total = k.logsumexp(2)
    shares = (k - total[:, :, None]).exp().masked_fill(k < NOTHING / 2, 0.0)
    q, shares, _ = _turned(q, shares, shares, angles)
    memory = shares.mT @ v
    return (q @ shares.mT) @ v if form == "parallel" else q @ memory, (memory, total)


def _checked_angles(angles: Tensor, key: Tensor) -> Tensor:
    try:
        return angles.expand_as(key)
    except RuntimeError:
        raise ValueError(
            f"angles must be broadcastable to keys of {tuple(key.shape)}, got {tuple(angles.shape)}"
        ) from None


def _checked_state(state: Sums, key: Tensor, value: Tensor, angles: Tensor | None) -> Sums:
    batch, heads, _, width = key.shape
    memory, total = (tensor.to(key) for tensor in state)
    shape = (batch, heads, width if angles is None else 2 * width, value.shape[3])
    if memory.shape != shape or total.shape != (batch, heads, width):
        raise ValueError(
            f"the state must be of shapes {shape} and {(batch, heads, width)}, "
            f"got {tuple(memory.shape)} and {tuple(total.shape)}"
        )
    return memory, total


class MDLRPE(Module):
    """Linearised relative positions of several dimensions: each channel turns with one of a token's coordinates.

    Of e = ⌈D / axes⌉ frequencies ``base^{−i/e}``, the same for each axis: the first e channels turn with the first
    coordinate, the next e with the second. The products of queries and keys then depend on differences of coordinates. That
    the frequencies are these, and constants, is a choice; the paper's was not at hand.

    Args:
        dim: D, of a head.
        base: of the frequencies.

    >>> import torch
    >>> angles = MDLRPE(6)(torch.tensor([[0, 0], [0, 1], [1, 0]]))
    >>> angles.shape
    torch.Size([3, 6])
    >>> angles[1]
    tensor([0.0000, 0.0000, 0.0000, 1.0000, 0.0464, 0.0022])
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, coordinates: Tensor) -> Tensor:
        """The angles (…, D) of coordinates (…, axes), in float32."""
        axes = coordinates.shape[-1]
        each = -(-self.dim // axes)
        theta = self.base ** (-torch.arange(each, device=coordinates.device) / each)
        return (coordinates[..., None] * theta).flatten(-2)[..., : self.dim]


class TPE(Module):
    """A Toeplitz positional encoding along one axis: ``y_i = Σ_{j≤i} c_{i−j} x_j,  c_τ = Σ_e b_e λ_e^τ``.

    Linear attention with constant queries and keys, hence with a state; ``λ = exp(−exp w)``. At first its terms remember for
    1 to 64 tokens, and c_0 is 1; that, the rank, and b for queries and keys together are choices. The first author's later
    code, xmixers, has a ``Tpe`` and an ``MdTpe`` of its own, which these do not follow.

    Args:
        dim: of the tokens.
        heads: that divide it, each with λ and b of its own.
        rank: terms of c.
        causal: else by the distance both ways, ``c_{|i−j|}``.

    >>> import torch
    >>> encoding, x = TPE(8, heads=2), torch.randn(2, 10, 8)
    >>> whole, _ = encoding(x)
    >>> first, state = encoding(x[:, :6])
    >>> rest, _ = encoding(x[:, 6:], state)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5))
    True
    """

    def __init__(self, dim: int, heads: int = 1, rank: int = 4, causal: bool = True) -> None:
        super().__init__()
        check_divides(type(self).__name__, dim, heads)
        if rank < 1:
            raise ValueError(f"TPE: rank must be at least 1, got {rank}")
        self.heads, self.rank, self.causal = heads, rank, causal
        self.rate = without_weight_decay(Parameter(-torch.linspace(0, math.log(64), heads * rank).view(heads, rank)))
        self.weight = Parameter(torch.full((heads, rank), 1 / rank))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The encoded tokens (B, N, dim), and the state (B, heads · rank, 1, dim / heads) that goes on."""
        values = split_heads(x, self.heads).repeat_interleave(self.rank, 1)
        ones = values.new_ones(1).expand(*values.shape[:3], 1)
        decay = -self.rate.float().exp().flatten()
        terms, after = linear_attention(ones, ones, values, decay, state, causal=self.causal)
        joined = terms.unflatten(1, (self.heads, self.rank)) * self.weight[:, :, None, None]
        return join_heads(joined.sum(2)), after


class MDTPE(Module):
    """`TPE` along each axis of multi-dimensional data, each with numbers of its own, summed: once, after the embedding.

    Both ways along each axis, by default, as an image has no past.

    Args:
        dim: of the tokens.
        axes: of the data.
        heads, rank, causal: as in `TPE`.

    >>> import torch
    >>> MDTPE(8, axes=2)(torch.randn(1, 5, 7, 8)).shape
    torch.Size([1, 5, 7, 8])
    """

    def __init__(self, dim: int, axes: int = 2, heads: int = 1, rank: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.along = ModuleList(TPE(dim, heads, rank, causal) for _ in range(axes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, side of each axis, dim), and the same encoded."""
        if x.ndim != len(self.along) + 2:
            raise ValueError(
                f"MDTPE of {len(self.along)} axes takes x of (batch, {len(self.along)} sides, dim), got {tuple(x.shape)}"
            )
        encoded = torch.zeros_like(x)
        for axis, encoding in enumerate(self.along, start=1):
            last = x.movedim(axis, -2)
            lines, _ = encoding(last.reshape(-1, *last.shape[-2:]))
            encoded = encoded + lines.view(last.shape).movedim(-2, axis)
        return encoded


class LightNet(ValueMixer):
    """The layer of LightNet: ``[norm(O) ∘ sigmoid(x U₁ U₂)] W``, queries under SiLU, queries and keys turned.

    With ``causal=False`` each token sees all, in one scan, and the places of images and videos are those of their ``grid``.
    What the paper's models had was not at hand. The gate and its rank (a head's width) are those of the first author's later
    code, xmixers, from which this differs in three things: there the gate comes before the norm, the norm is one of all heads
    (here of each, after which the gate), and the sum of weights begins at 1 and not at nothing, which is
    ``lightnet(q, k, v, (memory, total))`` with zeros for both.

    Args:
        dim: of the tokens.
        heads: that divide it.
        base: of the frequencies, see `MDLRPE`.
        causal: else each token sees all, and no call goes on from a state.

    Z. Qin et al. (2024), You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet.

    >>> import torch
    >>> mixer = LightNet(32, heads=4)
    >>> y, state = mixer(torch.randn(2, 10, 32))
    >>> picture, _ = LightNet(32, heads=4, causal=False)(torch.randn(2, 35, 32), grid=(5, 7))
    >>> y.shape, picture.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 35, 32]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="Z. Qin et al. (2024), You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        formula="z_i = log(e^{z_{i−1}} + e^{k_i}),  S_i = e^{z_{i−1} − z_i} S_{i−1} + e^{k_i − z_i} v_iᵀ,  o_i = S_iᵀ q_i",
        time="O(N D²/H)",
        state="2 D²/H + D",
        bidirectional=True,
        grids=True,
    )

    def __init__(self, dim: int, heads: int = 4, base: float = 10000.0, *, causal: bool = True) -> None:
        super().__init__(dim)
        check_divides(type(self).__name__, dim, heads)
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.g_proj = Sequential(Linear(dim, dim // heads, bias=False), Linear(dim // heads, dim, bias=False))
        self.positions = MDLRPE(dim // heads, base)
        self.norm = RMSNorm(dim // heads, eps=1e-5)
        self.o_proj = Linear(dim, dim, bias=False)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries under SiLU, keys, values, and the angles of their places: in the text, or on the grid."""
        query, key, value = heads_of(x, self.heads, self.q_proj, self.k_proj, self.v_proj)
        if layout.mask is not None:
            key = key.masked_fill(~layout.mask[:, None, :, None], NOTHING)
        parts = {"query": functional.silu(query), "key": key, "x": x}
        if layout.grid is not None:
            return Projected(value, parts | {"angles": self._on_grid(layout.grid, x)})
        places = positions_after(None if state is None else state["position"], x, layout.mask)
        angles: Tensor = self.positions(places[:, None, :, None])
        return Projected(value, parts | {"angles": angles}, {"position": places[:, -1] + 1})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scan, each token weighed by the exponential of its key."""
        before = None if state is None else (state["memory"], state["total"])
        mixed, (memory, total) = lightnet(
            projected["query"], projected["key"], projected.value, before,
            angles=projected["angles"], causal=layout.causal,
        )  # fmt: skip
        return mixed, {"memory": memory, "total": total}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, the gate, and the output's projection."""
        y: Tensor = self.o_proj(join_heads(self.norm(mixed)) * self.g_proj(projected["x"]).sigmoid())
        return y

    def without_values(self, state: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """Earlier tokens count, with values of zero."""
        return {**state, "memory": state["memory"].new_zeros(*state["memory"].shape[:3], width)}

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = e^{z_{i−1} − z_i}, b = e^{k − z}, c = q``, turned."""
        self._check_causal()
        projected = self.project(x)
        query, key = projected["query"], projected["key"]
        weights, decay, _ = _shares(key.to(torch.promote_types(key.dtype, torch.float32)), None)
        query, weights, decay = _turned(query, weights, decay, projected["angles"].to(weights))
        return DynamicalSystem(decay.exp(), weights, query)

    def _on_grid(self, grid: tuple[int, ...], x: Tensor) -> Tensor:
        """The angles of a grid's places, (N, D)."""
        sides = [torch.arange(side, device=x.device) for side in grid]
        angles: Tensor = self.positions(torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2))
        return angles
