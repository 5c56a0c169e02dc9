"""Adaptive filter attention: keys and values propagated through noisy linear dynamics, weighted by how well they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from regard.mixers.forms import Form, check_form, check_heads
from regard.mixers.hidden_map import HiddenMap
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.mixer import Facts, without_weight_decay
from regard.mixers.projected import Projected
from regard.mixers.rotary import check_rotary, rotary_rates, rotate
from regard.mixers.softmax.chunked_softmax import KEY_CHUNK, QUERY_CHUNK, Tile, attend_by_tiles
from regard.mixers.softmax.key_values import KeyValueMixer, positions_of


class Dynamics(NamedTuple):
    """The model of each head, ``dx = Λ x dt + σ dw`` with ``Λ = −μ ± iω``, observed with noise.

    ``decay`` μ > 0, ``process`` σ², ``key_noise`` η² and ``query_noise`` γ² > 0, (H,) each; ``frequency`` ω, (H, D/2), of the
    pairs of features; ``freedom`` ν > 0, (H,), of the Student-t law of residuals, for each pair (the larger, the less are
    outliers forgiven); ``sharpness`` (H,), a factor of the logits.
    """

    decay: Tensor
    frequency: Tensor
    process: Tensor
    key_noise: Tensor
    query_noise: Tensor
    freedom: Tensor
    sharpness: Tensor

    def variance(self, lag: Tensor) -> Tensor:
        """``V(τ) = σ² (1 − e^{−2μτ}) / 2μ + η² e^{−2μτ} + γ²``, the solution of ``V' = −2μV + σ²`` from η², and γ².

        Of lags that broadcast with the parameters.
        """
        exponent = -2 * self.decay * lag
        return -self.process * exponent.expm1() / (2 * self.decay) + self.key_noise * exponent.exp() + self.query_noise


def adaptive_filter_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dynamics: Dynamics,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    form: Form = "chunked",
    query_chunk: int = QUERY_CHUNK,
    key_chunk: int = KEY_CHUNK,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``o_i = Σ_j softmax_j(ℓ_ij) e^{Λ(t_i − t_j)} v_j``, the isotropic variant: one decay and one noise for a head.

    ``ℓ_ij = −s [log V_ij + (1 + ν) log(1 + R_ij / (ν d V_ij))]``, with d = D/2 pairs of features, the variance V of
    `Dynamics.variance` at the lag of i and j, and the residual ``R_ij = ‖q_i − e^{Λ(t_i − t_j)} k_j‖²``: the precision of
    what key j foretells of query i, times a robust weight of how far it is off. The frequencies are rotary positions of
    queries, keys and values, so that R and the output are products of matrices. The dynamics damp also what is mixed: the
    softmax's rows are multiplied by ``e^{−μ(t_i − t_j)}`` after it, and need not sum to 1.

    The exponent 1 + ν of the robust weight is the Student-t likelihood's, as in the author's later code; his first has 1.
    There is no finite state: the time is quadratic in N, as softmax attention's is, and the memory that of a tile.

    Args:
        query, key, value: (B, H, N, D), D even: the real parts of D/2 pairs, and then their imaginary parts.
        dynamics: of the heads.
        state: the turned keys and values before the first token, (B, H, M, D) each.
        mask: (B, M + N), false for keys that do not count, also as to time.
        causal: else each token sees all, over the absolute lag.
        form: "parallel" one tile, stored; "chunked" tile by tile, with a running maximum and sum; "recurrent" by queries.
        query_chunk, key_chunk: sides of a tile.

    Returns:
        The output (B, H, N, D) in the values' dtype, and the state: all keys and values, turned.

    Raises:
        ValueError: shapes that do not fit, odd head dimensions, a state where nothing is causal.

    P. Racioppo (2025), Attention as an Adaptive Filter.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> one, rates = torch.ones(2), torch.tensor([[1.0, 0.5, 0.1, 0.02]]).expand(2, -1)
    >>> dynamics = Dynamics(0.1 * one, rates, 0.02 * one, one, one, 4 * one, one)
    >>> y, state = adaptive_filter_attention(q, k, v, dynamics, query_chunk=16, key_chunk=16)
    >>> parallel, _ = adaptive_filter_attention(q, k, v, dynamics, form="parallel")
    >>> bool(torch.allclose(y, parallel, atol=1e-5))
    True
    """
    check_form(form)
    _check(query, key, value, dynamics, state, mask, causal)
    before = 0 if state is None else state[0].shape[2]
    positions = positions_of(mask, before + query.shape[2], query.device)
    own = positions[:, before:]
    turned, keys, values = (rotate(tensor, own, -dynamics.frequency) for tensor in (query, key, value))
    if state is not None:
        keys, values = torch.cat([state[0], keys], dim=2), torch.cat([state[1], values], dim=2)
    mixed = _filtered(turned, keys, values, mask, positions, dynamics, causal, form, (query_chunk, key_chunk))
    return rotate(mixed, own, dynamics.frequency).to(value.dtype), (keys, values)


def _filtered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    positions: Tensor,
    dynamics: Dynamics,
    causal: bool,
    form: Form,
    chunks: tuple[int, int],
    *,
    stored: bool = False,
) -> Tensor:
    """Values mixed in the frame that turns with time, where propagating them is damping them."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    model = Dynamics(*(parameter.to(dtype)[:, None, None] for parameter in dynamics))
    pairs, before = query.shape[3] / 2, key.shape[2] - query.shape[2]
    time = positions.to(dtype)[:, None]

    def tile(rows: slice, columns: slice) -> Tile:
        q, k, v = (t.to(dtype) for t in (query[:, :, rows], key[:, :, columns], value[:, :, columns]))
        lag = (time[:, :, before:][:, :, rows, None] - time[:, :, None, columns]).abs()
        fade, variance = (-model.decay * lag).exp(), model.variance(lag)
        squares = q.square().sum(-1, keepdim=True) + fade.square() * k.square().sum(-1)[:, :, None]
        residual = (squares - 2 * fade * (q @ k.mT)).clamp(min=0)
        unlikely = (1 + model.freedom) * (residual / (model.freedom * pairs * variance)).log1p()
        logits = -model.sharpness * (variance.log() + unlikely)
        if real is not None:
            logits = logits.masked_fill(~real[:, None, None, columns], -torch.inf)
        return Tile(logits, v, fade)

    return attend_by_tiles(tile, (query.shape[2], key.shape[2]), causal, form, chunks, stored=stored)


def diagonal_filter_attention(
    query: Tensor, key: Tensor, value: Tensor, dynamics: Dynamics, *, causal: bool = True
) -> Tensor:
    """The full variant, for reference: a decay and noises for each pair of features, and so a matrix for each pair.

    ``ℓ_ij(m) = −s [log V_ij(m) + (1 + ν) log(1 + Σ_n R_ij(n) / V_ij(n) / (ν d))]``: pairs share the robust weight, not the
    precision. It stores N² D numbers a head.

    Args:
        query, key, value: (B, H, N, D), D even, as for `adaptive_filter_attention`.
        dynamics: with ``decay``, ``process``, ``key_noise`` and ``query_noise`` of shape (H, D/2).
        causal: else each token sees all.

    Returns:
        (B, H, N, D).

    Raises:
        ValueError: shapes that do not fit, odd head dimensions.

    P. Racioppo (2025), Attention as an Adaptive Filter.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 20, 8)
    >>> one, each = torch.ones(2), torch.ones(2, 4)
    >>> dynamics = Dynamics(0.1 * each, each, 0.02 * each, each, each, 4 * one, one)
    >>> same = Dynamics(0.1 * one, each, 0.02 * one, one, one, 4 * one, one)
    >>> isotropic, _ = adaptive_filter_attention(q, k, v, same)
    >>> bool(torch.allclose(diagonal_filter_attention(q, k, v, dynamics), isotropic, atol=1e-4))
    True
    """
    _check(query, key, value, dynamics, None, None, causal, diagonal=True)
    pairs, length = query.shape[3] // 2, query.shape[2]
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (torch.complex(*tensor.to(dtype).chunk(2, dim=-1)) for tensor in (query, key, value))
    model = Dynamics(*(parameter.to(dtype).reshape(len(parameter), 1, 1, -1) for parameter in dynamics))
    time = torch.arange(length, device=query.device, dtype=dtype)
    lag = (time[:, None] - time)[None, :, :, None]  # (1, N, N, 1), with the parameters (H, N, N, D/2)
    moved = torch.polar((-model.decay * lag.abs()).exp(), model.frequency * lag)
    variance = model.variance(lag.abs())
    residual = q[:, :, :, None] - moved * k[:, :, None]
    squares = residual.real.square() + residual.imag.square()
    unlikely = (1 + model.freedom) * ((squares / variance).sum(-1, keepdim=True) / (model.freedom * pairs)).log1p()
    logits = -model.sharpness * (variance.log() + unlikely)
    if causal:
        logits = logits.masked_fill((lag < 0), -torch.inf)
    mixed = (logits.softmax(3) * moved * v[:, :, None]).sum(3)
    return torch.cat([mixed.real, mixed.imag], dim=-1).to(value.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dynamics: Dynamics,
    state: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    causal: bool,
    *,
    diagonal: bool = False,
) -> None:
    check_heads(query, key, value)
    batch, heads, length, width = query.shape
    if value.shape != query.shape or width % 2:
        raise ValueError(
            "queries, keys and values are pairs of features that turn together: they must be of one shape with an even last "
            f"dimension, got {tuple(query.shape)} and values of {tuple(value.shape)}"
        )
    each = {"frequency", "decay", "process", "key_noise", "query_noise"} if diagonal else {"frequency"}
    for name, parameter in dynamics._asdict().items():
        shape = (heads, width // 2) if name in each else (heads,)
        if parameter.shape != shape:
            raise ValueError(f"dynamics.{name} must be of shape {shape}, got {tuple(parameter.shape)}")
    before = 0 if state is None else state[0].shape[2]
    if state is not None:
        if not causal:
            raise ValueError("without causal=True there is no state to begin with: every token sees all others")
        expected = (batch, heads, before, width)
        if state[0].shape != expected or state[1].shape != expected:
            found = " and ".join(str(tuple(tensor.shape)) for tensor in state)
            raise ValueError(f"the state's keys and values must be of shape {expected}, got {found}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, before + length)):
        raise ValueError(
            f"mask must be boolean, of shape {(batch, before + length)}, got {mask.dtype} {tuple(mask.shape)}"
        )


class AdaptiveFilterAttention(KeyValueMixer):
    """The isotropic layer: `adaptive_filter_attention` of learned dynamics, and a gate between its estimate and the token's
    own value, ``g o_i + (1 − g) v_i``.

    Frequencies are rotary positions' and fixed. The first quarter of the heads begins all but without decay, the others at
    0.01 … 0.95 a token; process noise begins where it adds a variance of 0.1 in the long run, both measurement noises at 1.31
    (softplus 1), ν at 4, sharpness at 1, g at ½. A prediction of the next step before the output's projection, which the
    author's code offers, is left to that projection: it is a fixed map of each head.

    The state is every key and every value, turned, and grows with the text.

    Args:
        dim: of the tokens.
        heads: that divide it, into an even dimension of each.
        rotary: the base of the frequencies.
        query_chunk, key_chunk: sides of a tile.
        causal: else each token sees all, over the absolute lag, and no call goes on from a state.

    Raises:
        ValueError: heads that do not divide the width, odd head dimensions.

    P. Racioppo (2025), Attention as an Adaptive Filter.

    >>> import torch
    >>> mixer, x = AdaptiveFilterAttention(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, state.tensors["key"].shape, mixer.map(x).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 11, 8]), (2, 4, 10, 10))
    """

    facts: ClassVar[Facts] = Facts(
        paper="P. Racioppo (2025), Attention as an Adaptive Filter",
        formula="o_i = Σ_j softmax_j(−log V_ij − (1 + ν) log(1 + ‖q_i − e^{Λτ} k_j‖² / (ν d V_ij))) e^{Λτ} v_j, τ = i − j",
        time="O(N² D)",
        state="2 N D",
        bidirectional=True,
    )

    frequency: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        rotary: float = 10_000.0,
        query_chunk: int = QUERY_CHUNK,
        key_chunk: int = KEY_CHUNK,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__(dim, heads, causal)
        check_rotary(type(self).__name__, dim, heads)
        self.chunks = (query_chunk, key_chunk)
        slow = max(heads // 4, 1)
        decay = torch.cat([torch.full((slow,), 1e-5), torch.logspace(math.log10(0.01), math.log10(0.95), heads - slow)])
        self.log_decay = without_weight_decay(Parameter(decay.log()))
        self.log_process = without_weight_decay(Parameter((2 * 0.1 * decay).log()))
        noise = math.log(math.log1p(math.e))
        self.log_key_noise, self.log_query_noise = (Parameter(torch.full((heads,), noise)) for _ in range(2))
        self.log_freedom = without_weight_decay(Parameter(torch.full((heads,), math.log(4.0))))
        self.log_sharpness = without_weight_decay(Parameter(torch.zeros(heads)))
        self.gate = Parameter(torch.zeros(heads))
        self.register_buffer("frequency", rotary_rates(dim // heads, rotary).float().repeat(heads, 1))

    @property
    def dynamics(self) -> Dynamics:
        """The learned model."""
        logs = (
            self.log_process,
            self.log_key_noise,
            self.log_query_noise,
            self.log_freedom,
            self.log_sharpness,
        )
        return Dynamics(self.log_decay.exp(), self.frequency, *(parameter.exp() for parameter in logs))

    def place(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, turned back by what the dynamics turn them."""
        return (
            rotate(query, positions, -self.frequency),
            rotate(key, positions, -self.frequency),
            rotate(value, positions, -self.frequency),
        )

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The filter's estimate and the tokens' own values, in the frame that turns with time."""
        return self._filter(projected, layout, stored=False), {}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Turned to where the queries are, and the output's projection."""
        positions = _positions(projected)[:, -projected["query"].shape[2] :]
        return super().out(rotate(mixed, positions, self.frequency).to(projected.value.dtype), projected)

    def hidden_map(self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout) -> HiddenMap:
        """The matrix of the values in the frame that turns with time, the gate in it, (B, H, N, M)."""

        def apply(values: Tensor) -> Tensor:
            return self._filter(projected.with_value(values), layout, stored=True)

        batch, heads, tokens, _ = projected["query"].shape
        return HiddenMap(apply, (batch, heads, tokens, projected.value.shape[2]), projected.value)

    def _filter(self, projected: Projected, layout: Layout, stored: bool) -> Tensor:
        query, value = projected["query"], projected.value
        mixed = _filtered(
            query, projected["key"], value, projected.get("real"), _positions(projected), self.dynamics,
            layout.causal, "chunked", self.chunks, stored=stored,
        )  # fmt: skip
        gate = self.gate.sigmoid()[:, None, None]
        return gate * mixed + (1 - gate) * value[:, :, -query.shape[2] :]


def _positions(projected: Projected) -> Tensor:
    """Of the keys, (B or 1, M)."""
    return positions_of(projected.get("real"), projected.value.shape[2], projected.value.device)
