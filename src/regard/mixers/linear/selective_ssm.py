"""The selective state space of Mamba (S6): a diagonal system whose step, input and output maps depend on the token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Linear, Parameter, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, softplus
from regard.mixers.hidden_map import Apply, HiddenMap
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear.short_convolution import ShortConvolution
from regard.mixers.mixer import Facts, expanded, without_weight_decay
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer

CHUNK = 64


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    into: Tensor,
    out: Tensor,
    state: Tensor | None = None,
    *,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``h_i = exp(−Δ_i a) ∘ h_{i−1} + Δ_i x_i b_i,  y_i = h_i · c_i``, for each channel with a state of S numbers of its own.

    The decay is discretised by zero-order hold and the input by Euler's rule. It is linear attention with queries c, keys b,
    values Δ x and a decay for each pair of channel and state, so that no chunk is a product of matrices: what is not of the
    recurrence itself is computed of a chunk's tokens at once. Nothing grows, whatever the decay.

    Args:
        x: (B, H, N, D), D channels in each of H groups, which share b and c (Mamba has one group).
        step: Δ, (B, H, N, D), at least 0; 0 leaves the state as it is.
        rate: a, (H, D, S), positive; Mamba's A is −a.
        into, out: b and c, (B, H, N, S).
        state: h before the first token, (B, H, D, S); zeros by default.
        form: "parallel" the quadratic reference over pairs of tokens, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens whose states are held at once; where there are more, each chunk is computed again in the backward pass.

    Returns:
        The output (B, H, N, D) in the dtype of x, and h after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit, chunks of no tokens.

    A. Gu and T. Dao (2023), Mamba: Linear-Time Sequence Modeling with Selective State Spaces.

    >>> import torch
    >>> x, step, b, c = torch.randn(4, 1, 1, 50, 8)
    >>> rate = torch.arange(1.0, 9).expand(1, 8, 8)
    >>> chunked, state = selective_scan(x, step.exp(), rate, b, c)
    >>> parallel, _ = selective_scan(x, step.exp(), rate, b, c, form="parallel")
    >>> bool(torch.allclose(chunked, parallel, atol=1e-3)), state.shape
    (True, torch.Size([1, 1, 8, 8]))
    """
    check_form(form)
    _check(x, step, rate, into, out, state)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(*x.shape[:2], *rate.shape[1:], dtype=dtype) if state is None else state.to(dtype)
    step = step.to(dtype)
    run = _parallel if form == "parallel" else _chunks
    size = 1 if form == "recurrent" else chunk
    output, after = run(step * x.to(dtype), step, rate.to(dtype), into.to(dtype), out.to(dtype), before, size)
    return output.to(x.dtype), after


def _parallel(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, before: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """As linear attention of each channel alone."""
    query, key, decay = channels(step, rate, into, out)
    y, after = linear_attention(
        query, key, x.mT.flatten(1, 2)[..., None], decay, before.flatten(1, 2)[..., None], form="parallel"
    )
    return y.reshape(x.mT.shape).mT, after.reshape(before.shape)


def channels(step: Tensor, rate: Tensor, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and log decays, (B, H·D, N, S) each, of the linear attention that the channels are."""
    decay = -step.mT[..., None] * rate[:, :, None]  # (B, H, D, N, S)
    query, key = (tensor[:, :, None].expand_as(decay).flatten(1, 2) for tensor in (out, into))
    return query, key, decay.flatten(1, 2)


def _chunks(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, before: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Chunks one after another: the states of all tokens of a text would be S times as large as the text."""
    by_token = (tensor.movedim(2, 0).contiguous().split(size) for tensor in (x, step, into, out))  # (N, B, H, …)
    outputs = []
    for chunk in zip(*by_token, strict=True):
        y, before = _Chunk.apply(*chunk, rate, before)  # type: ignore[no-untyped-call]
        outputs.append(y)
    return torch.cat(outputs).movedim(0, 2), before


def _states(x: Tensor, step: Tensor, rate: Tensor, into: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What each token keeps of the state before it, and the states before the first and after each, (N + 1, B, H, D, S)."""
    kept = (step[..., None] * -rate).exp_()
    return kept, _scan(kept, x[..., None] * into[..., None, :], before)


def _scan(kept: Tensor, added: Tensor, before: Tensor) -> Tensor:
    """``h_i = kept_i ∘ h_{i−1} + added_i``, h_0 first."""
    if torch.is_grad_enabled():  # in a backward pass that is to be differentiated again
        states = [before]
        for factor, addition in zip(kept.unbind(), added.unbind(), strict=True):
            states.append(torch.addcmul(addition, factor, states[-1]))
        return torch.stack(states)
    all_states = added.new_empty(len(added) + 1, *added.shape[1:])
    all_states[0] = before
    places = all_states.unbind()
    for factor, addition, old, new in zip(kept.unbind(), added.unbind(), places[:-1], places[1:], strict=True):
        torch.addcmul(addition, factor, old, out=new)
    return all_states


class _Chunk(Function):
    """The outputs of a chunk's tokens, and the state after them; the backward pass makes their states again.

    Autograd would store the states of all tokens, and add up their gradients one by one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, into: Tensor, out: Tensor, rate: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, step, into, out, rate, before)
        _, states = _states(x, step, rate, into, before)
        return (states[1:] @ out[..., None]).squeeze(-1), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, y_slope: Tensor, last_slope: Tensor) -> tuple[Tensor, ...]:
        x, step, into, out, rate, before = ctx.saved_tensors
        kept, states = _states(x, step, rate, into, before)
        # The slope by a state is that by its own output and what the next one hands back: the recurrence from the end.
        back = _scan(
            torch.cat([torch.ones_like(kept[:1]), kept[1:].flip(0)]),
            (y_slope[..., None] * out[..., None, :]).flip(0), last_slope,
        )  # fmt: skip
        slopes = back[1:].flip(0)
        exponent = slopes * states[:-1] * kept  # the slope by −Δ a
        return (
            (slopes @ into[..., None]).squeeze(-1),
            -(exponent * rate).sum(-1),
            (x[..., None, :] @ slopes).squeeze(-2),
            (y_slope[..., None, :] @ states[1:]).squeeze(-2),
            -(exponent * step[..., None]).sum((0, 1)),
            slopes[0] * kept[0],
        )


def _check(x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor | None) -> None:
    if x.ndim != 4 or not x.shape[2]:
        raise ValueError(f"x must be (batch, heads, tokens, dim) with tokens, got {tuple(x.shape)}")
    batch, heads, length, width = x.shape
    if rate.ndim != 3 or rate.shape[:2] != (heads, width):
        raise ValueError(f"rate must be of shape ({heads}, {width}, states), got {tuple(rate.shape)}")
    states = rate.shape[2]
    expected = {
        "step": (step, x.shape),
        "into": (into, (batch, heads, length, states)),
        "out": (out, (batch, heads, length, states)),
        "the state": (state, (batch, heads, width, states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be of shape {tuple(shape)}, got {tuple(tensor.shape)}")


class SelectiveSSM(ValueMixer):
    """The layer of Mamba: a short convolution and SiLU, the selective scan with ``Δ = softplus(W x + β)``, a skip ``D ∘ x``
    and a SiLU gate.

    a begins as 1 … S in each channel, D as 1, and softplus(β) between 0.001 and 0.1, so that channels remember for
    different times.

    Args:
        dim: of the tokens.
        state_size: S, numbers that each channel remembers.
        expand: channels for each dimension of the tokens.
        time_step_rank: of the projection to Δ; dim / 16 by default.
        conv_kernel: tokens that the short convolution sees.
        use_conv_bias: whether it has a bias, as in the paper's code.
        use_bias: whether the projections of tokens, in and out, have one.

    Raises:
        ValueError: a size below 1, or an expanded width that is not whole.

    A. Gu and T. Dao (2023), Mamba: Linear-Time Sequence Modeling with Selective State Spaces.

    >>> import torch
    >>> mixer, x = SelectiveSSM(32), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> y.shape, state.tensors["memory"].shape, mixer.map(x).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 64, 16]), (2, 64, 10, 10))
    """

    facts: ClassVar[Facts] = Facts(
        paper="A. Gu and T. Dao (2023), Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        formula="h_i = exp(−Δ_i a) ∘ h_{i−1} + Δ_i x_i b_iᵀ,  y_i = h_i c_i + D ∘ x_i",
        time="O(N D S)",
        state="2 (S + K − 1) D",
    )

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        expand: float = 2,
        time_step_rank: int | None = None,
        conv_kernel: int = 4,
        *,
        use_conv_bias: bool = True,
        use_bias: bool = False,
    ) -> None:
        super().__init__(dim)
        rank = math.ceil(dim / 16) if time_step_rank is None else time_step_rank
        for name, size in (("state_size", state_size), ("time_step_rank", rank)):
            if size < 1:
                raise ValueError(f"SelectiveSSM: {name} must be at least 1, got {size}")
        self.state_size, self.time_step_rank = state_size, rank
        width = expanded("SelectiveSSM", dim, expand)
        self.in_proj = Linear(dim, 2 * width, bias=use_bias)
        self.conv1d = ShortConvolution(width, conv_kernel, use_conv_bias)
        self.x_proj = Linear(width, rank + 2 * state_size, bias=False)
        self.dt_proj = Linear(rank, width)
        self.A_log = without_weight_decay(Parameter(torch.arange(1.0, state_size + 1).log().repeat(width, 1)))
        self.D = without_weight_decay(Parameter(torch.ones(width)))
        self.out_proj = Linear(width, dim, bias=use_bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            step = torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj.bias.copy_(step.expm1().log())  # the inverse of softplus

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Convolved channels as heads of one value, (B, E, N, 1), their gates, and what selects: Δ, b and c."""
        channels, gate = self.in_proj(x).chunk(2, dim=-1)
        if layout.mask is not None:  # with a bias, padding is no longer zeros
            channels = channels * layout.mask[..., None]
        values, tail = self.conv1d(channels, None if state is None else state["tail"], layout.mask)
        low, into, out = self.x_proj(values)[:, None].split(
            [self.time_step_rank, self.state_size, self.state_size], dim=-1
        )
        step = softplus(self.dt_proj(low))
        if layout.mask is not None:
            step = step * layout.mask[:, None, :, None]
        parts = {"query": out, "key": into, "step": step, "gate": gate, "channels": values}
        return Projected(values.mT[..., None], parts, {"tail": tail})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The selective scan, without the skip."""
        values = projected.value.squeeze(3).mT[:, None]
        before = None if state is None else state["memory"][:, None]
        mixed, memory = selective_scan(
            values, projected["step"], self.A_log.exp()[None], projected["key"], projected["query"], before
        )
        return mixed.squeeze(1).mT[..., None], {"memory": memory.squeeze(1)}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """The skip, the gate, and the output's projection."""
        skipped = mixed.squeeze(3).mT + self.D * projected["channels"]
        y: Tensor = self.out_proj(skipped * functional.silu(projected["gate"]))
        return y

    def hidden_map(self, projected: Projected, state: Mapping[str, Tensor] | None, layout: Layout) -> HiddenMap:
        """The matrix of each channel's values after their convolution, channels as heads; the skip is beside it."""
        query, key, decay = self._channels(projected)
        batch, width, tokens, _ = query.shape

        def of_channels(some: Tensor | slice) -> Apply:
            own = query[:, some], key[:, some], decay[:, some]
            return lambda values: linear_attention(own[0], own[1], values, own[2])[0]

        return HiddenMap(of_channels(slice(None)), (batch, width, tokens, tokens), projected.value, of_channels)

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = exp(−Δ a), b = Δ b(x), c = c(x)``, channels as heads."""
        query, key, decay = self._channels(self.project(x))
        return DynamicalSystem(decay.exp(), key, query)

    def _channels(self, projected: Projected) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys with their Δ, and log decays (B, E, N, S)."""
        step = projected["step"]
        query, key, decay = channels(step, self.A_log.exp()[None], projected["key"], projected["query"])
        return query, key * step.squeeze(1).mT[..., None], decay
