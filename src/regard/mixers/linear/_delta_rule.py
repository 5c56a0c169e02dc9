"""The delta rule: a memory that replaces what it holds for a key instead of adding to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Linear, RMSNorm, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, check_heads, cut, initial_state
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear import _fla_kernels
from regard.mixers.linear.short_convolution import ShortConvolution, convolved_parts
from regard.mixers.mixer import (
    Facts,
    check_divides,
    check_groups,
    expanded,
    gated,
    repeat_heads,
    split_heads,
)
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer

CHUNK = 64


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    form: Form = "chunked",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_i = α_i (I − β_i k_i k_iᵀ) S_{i−1} + β_i k_i v_iᵀ,  o_i = S_iᵀ q_i``.

    Written as ``S_i = α_i S_{i−1} + k_i u_iᵀ``, the corrections ``u_i = β_i (v_i − α_i S_{i−1}ᵀ k_i)`` of a chunk solve one
    triangular system, so that chunks are products of matrices. Where a GPU and flash-linear-attention are, the chunked
    form of values in half precision is its Triton kernel, whose gradients have none of their own, unless `chunk` is given.

    Args:
        query, key: (B, H, N, Dk); keys of length 1, or β‖k‖² ≤ 2, keep the memory from growing.
        value: (B, H, N, Dv).
        beta: (B, H, N), how far a value replaces the old one, 0 to 1 (or 2).
        state: S before the first token, (B, H, Dk, Dv); zeros by default.
        log_decay: log α, (B, H, N), at most 0; none by default.
        form: "parallel" one triangular system of all tokens, "chunked" one for each chunk, "recurrent" token by token.
        chunk: tokens of a chunk, by default 64 or the kernel's own.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and S after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    I. Schlag et al. (2021), Linear Transformers Are Secretly Fast Weight Programmers; S. Yang et al. (2024), Parallelizing
    Linear Transformers with the Delta Rule over Sequence Length.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> k = torch.nn.functional.normalize(k, dim=-1)
    >>> chunked, state = delta_rule(q, k, v, torch.rand(1, 2, 100))
    >>> chunked.shape, state.shape
    (torch.Size([1, 2, 100, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_form(form)
    check_heads(query, key, value)
    for name, gate in (("beta", beta), ("log_decay", log_decay)):
        if gate is not None and gate.shape != query.shape[:3]:
            raise ValueError(f"{name} must be of shape {tuple(query.shape[:3])}, got {tuple(gate.shape)}")
    before = initial_state(state, query, value)
    if form == "chunked" and chunk is None:
        kernel = _fla_kernels.operator("delta_rule" if log_decay is None else "gated_delta_rule", query, value)
        if kernel is not None:
            heads = {"q": query.to(value), "k": key.to(value), "v": value, "beta": beta}
            if log_decay is not None:
                heads["g"] = log_decay.float()
            return _fla_kernels.run(kernel, heads, value, state)
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v, b = (tensor.to(dtype) for tensor in (query, key, value, beta))
    decay = torch.zeros_like(b) if log_decay is None else log_decay.to(dtype)
    if form == "recurrent":
        output, after = _recurrent(q, k, v, b, decay, before)
    else:
        size = q.shape[2] if form == "parallel" else min(CHUNK if chunk is None else chunk, q.shape[2])
        output, after = _chunked(q, k, v, b, decay, before, size)
    return output.to(value.dtype), after


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, before: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    q, k, v, beta, decay = (cut(t, chunk) for t in (q, k, v, beta[..., None], decay[..., None]))
    total = decay.cumsum(3)  # (B, H, chunks, chunk, 1)
    end = total[:, :, :, -1:]
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (total - total.mT).masked_fill(hidden, -torch.inf).exp()
    # (I + A) U = β (V − e^G K S): what earlier tokens of the chunk wrote for a key is taken into account.
    system = (beta * (k @ k.mT) * between).tril(-1) + torch.eye(chunk, device=q.device, dtype=q.dtype)
    right = torch.cat([beta * v, beta * total.exp() * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    within, seen, left = (q @ k.mT) * between, q * total.exp(), k * (end - total).exp()
    outputs = []
    for parts in zip(*(t.unbind(2) for t in (written, read, seen, within, end.exp(), left.mT)), strict=True):
        to_write, to_read, query, pairs, kept, key = parts
        corrections = to_write - to_read @ before
        outputs.append(query @ before + pairs @ corrections)
        before = kept * before + key @ corrections
    return torch.cat(outputs, dim=2)[:, :, :length], before


def _recurrent(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    rows = (q[..., None, :], k[..., None, :], v[..., None, :], beta[..., None, None], decay.exp()[..., None, None])
    for query, key, value, written, kept in zip(*(t.unbind(2) for t in rows), strict=True):
        before = kept * before
        before = before + key.mT * (written * (value - key @ before))
        outputs.append(query @ before)
    return torch.cat(outputs, dim=2), before


def _unit(x: Tensor) -> Tensor:
    """Of length 1, zeros as they are; with the epsilon of flash-linear-attention, which weighs for short vectors."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _unit_sum(x: Tensor) -> Tensor:
    return functional.normalize(x, p=1.0, dim=-1, eps=1e-6)


_NORMS = {"l2": _unit, "sum": _unit_sum}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "elu": lambda x: functional.elu(x) + 1,
    "identity": lambda x: x,
}


class DeltaRule(ValueMixer):
    """The layer of DeltaNet: short convolutions and SiLU before queries, keys and values, keys of length 1, queries of length
    1/√D, ``β = sigmoid(W x)``, an RMS norm of each head's output.

    Args:
        dim: of the tokens.
        heads: of queries and keys.
        num_v_heads: of values, a multiple of `heads`; as many by default.
        head_dim: D, of a head of queries and keys; ``dim / heads`` by default.
        expand_v: a head of values is so many times as wide as one of keys.
        use_gate: multiply the normed output by ``SiLU(W x)``.
        use_beta: else β = 1.
        use_short_conv: else there is no convolution.
        conv_size: tokens that the short convolutions see.
        conv_bias: whether they have a bias.
        allow_neg_eigval: β from 0 to 2, so that what is held for a key may change its sign.
        qk_norm: queries and keys are divided by their length, "l2", or by the sum of their absolute numbers, "sum".
        qk_activation: of queries and keys, "silu", "relu", "elu" (and 1 is added) or "identity".
        norm_eps: of the norm.

    Raises:
        ValueError: heads that do not divide the width, or one another; no such norm or activation.

    S. Yang et al. (2024), Parallelizing Linear Transformers with the Delta Rule over Sequence Length.

    >>> import torch
    >>> mixer, x = DeltaRule(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, step.shape, state.seen
    (torch.Size([2, 10, 32]), torch.Size([2, 32]), 11)
    """

    facts: ClassVar[Facts] = Facts(
        paper="S. Yang et al. (2024), Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        formula="S_i = (I − β_i k_i k_iᵀ) S_{i−1} + β_i k_i v_iᵀ,  o_i = S_iᵀ q_i / √D,  β = σ(W x)",
        time="O(N D²/H)",
        state="D²/H + 3 (K − 1) D",
    )

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_gate: bool = False,
        use_beta: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        qk_norm: str = "l2",
        qk_activation: str = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        name = type(self).__name__
        for given, known in ((qk_norm, _NORMS), (qk_activation, _ACTIVATIONS)):
            if given not in known:
                raise ValueError(f"{name}: there is no {given!r} of queries and keys; known are {', '.join(known)}")
        if head_dim is None:
            check_divides(name, dim, heads)
            head_dim = dim // heads
        self.heads, self.num_v_heads = heads, heads if num_v_heads is None else num_v_heads
        check_groups(name, ("heads", heads), ("num_v_heads", self.num_v_heads))
        self.allow_neg_eigval, self.qk_norm, self.qk_activation = allow_neg_eigval, qk_norm, qk_activation
        v_dim = expanded(name, head_dim, expand_v)
        key_width, value_width = heads * head_dim, self.num_v_heads * v_dim
        self.q_proj, self.k_proj = (Linear(dim, key_width, bias=False) for _ in range(2))
        self.v_proj = Linear(dim, value_width, bias=False)
        self.conv1d = (
            ShortConvolution(2 * key_width + value_width, conv_size, conv_bias, activation=False)
            if use_short_conv
            else None
        )
        self.b_proj = Linear(dim, self.num_v_heads, bias=False) if use_beta else None
        self.g_proj = Linear(dim, value_width, bias=False) if use_gate else None
        self.norm = RMSNorm(v_dim, eps=norm_eps)
        self.o_proj = Linear(value_width, dim, bias=False)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries, keys and values behind one convolution, one for each head of values, β, and where it forgets, log α."""
        before = None if state is None or self.conv1d is None else state["tail"]
        projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        (query, key, value), tail = convolved_parts(projected, self.conv1d, before, layout.mask)
        activation, norm = _ACTIVATIONS[self.qk_activation], _NORMS[self.qk_norm]
        query, key = (norm(activation(split_heads(part, self.heads))) for part in (query, key))
        query, key = (repeat_heads(part, self.num_v_heads) for part in (query, key))
        query = query * query.shape[3] ** -0.5  # which the norm does not undo, as long as its epsilon weighs
        real = 1.0 if layout.mask is None else layout.mask[:, None]
        gates = {name: gate * real for name, gate in self._gates(x).items()}
        value = split_heads(functional.silu(value), self.num_v_heads)
        return Projected(value, {"query": query, "key": key, "x": x, **gates}, tail)

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The delta rule."""
        mixed, after = delta_rule(
            projected["query"], projected["key"], projected.value, projected["beta"],
            None if state is None else state["memory"], log_decay=projected.get("log_decay"),
        )  # fmt: skip
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, gated where there is a gate, and the output's projection."""
        y: Tensor = self.o_proj(gated(self.norm(mixed), projected["x"], self.g_proj))
        return y

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = α (I − β k kᵀ), b = β k, c = q``."""
        projected = self.project(x)
        key, beta, decay = projected["key"], projected["beta"][..., None], projected.get("log_decay")
        transition = torch.eye(key.shape[-1], device=x.device) - beta[..., None] * key[..., None] * key[..., None, :]
        if decay is not None:
            transition = decay.exp()[..., None, None] * transition
        return DynamicalSystem(transition, beta * key, projected["query"])

    def _gates(self, x: Tensor) -> dict[str, Tensor]:
        """β, (B, H, N)."""
        ones = x.new_ones(len(x), self.num_v_heads, x.shape[1])
        beta = ones if self.b_proj is None else self.b_proj(x).sigmoid().mT
        return {"beta": 2 * beta if self.allow_neg_eigval else beta}
