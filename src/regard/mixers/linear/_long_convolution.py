"""A causal convolution as long as the text, with a kernel of decaying exponentials, so that its state is of fixed size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module, Parameter, functional

from regard.mixers.forms import Form, check_form
from regard.mixers.mixer import without_weight_decay

CHUNK = 64


def long_convolution(
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``y_i = Σ_{j≤i} K_{i−j} ∘ x_j,  K_t = Σ_m w_m exp(t g_m)``, each channel with a kernel of its own.

    It is the recurrence ``S_i = exp(g) ∘ S_{i−1} + x_i,  y_i = Σ_m w_m S_i,m``: the diagonal state space, or the moving
    average of Mega.

    Args:
        x: (B, N, D).
        log_decay: g, at most 0, (D, M) for M exponentials a channel.
        weight: w, (D, M).
        state: S before the first token, (B, D, M); zeros by default.
        mask: (B, N), false for padding, which comes first in each text; its outputs mean nothing.
        form: "parallel" one matrix of all pairs for each channel, "chunked" such matrices within chunks and the recurrence
            between them, "recurrent" token by token.
        chunk: tokens of a chunk.

    Returns:
        The output (B, N, D) in x's dtype, and S after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit.

    X. Ma et al. (2023), Mega: Moving Average Equipped Gated Attention.

    >>> import torch
    >>> x, weight = torch.randn(2, 100, 8), torch.randn(8, 4)
    >>> y, state = long_convolution(x, -torch.rand(8, 4), weight)
    >>> y.shape, state.shape
    (torch.Size([2, 100, 8]), torch.Size([2, 8, 4]))
    """
    check_form(form)
    _check(x, log_decay, weight, state, mask)
    dtype = torch.promote_types(x.dtype, torch.float32)
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
    inputs = (x * real[..., None]).to(dtype).mT  # (B, D, N)
    log_decay, weight = log_decay.to(dtype), weight.to(dtype)
    before = inputs.new_zeros(x.shape[0], *weight.shape) if state is None else state.to(dtype)
    if form == "recurrent":
        output, after = _recurrent(inputs, log_decay, weight, before, real)
    else:
        size = x.shape[1] if form == "parallel" else min(chunk, x.shape[1])
        output, after = _chunked(inputs, log_decay, weight, before, real, size)
    return output.mT.to(x.dtype), after


def _chunked(
    x: Tensor, log_decay: Tensor, weight: Tensor, before: Tensor, real: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Zeros that fill up the first chunk are padding like any other: they come first, and the state skips them."""
    batch, dim, length = x.shape
    extra = -length % size
    x = functional.pad(x, (extra, 0)).reshape(batch, dim, -1, size)
    counts = functional.pad(real.long(), (extra, 0)).reshape(batch, 1, -1, size).cumsum(3)
    powers = (log_decay[..., None] * torch.arange(size + 1, device=x.device)).exp()  # (D, M, size + 1)
    inside = torch.einsum("dij,bdnj->bdni", _matrix(powers, weight), x)
    added = torch.einsum("dmj,bdnj->bdnm", powers[..., :size].flip(-1), x)
    states = []
    for number in range(x.shape[2]):
        states.append(before)
        before = (log_decay * counts[:, :, number, -1:]).exp() * before + added[:, :, number]
    seen = torch.einsum("bdnm,dmi->bdni", torch.stack(states, dim=2), weight[..., None] * powers[..., 1:])
    if size > 1:  # a chunk that begins with padding has aged less than its places say
        seen = seen.gather(3, (counts - 1).clamp(min=0).expand_as(seen))
    return (inside + seen).reshape(batch, dim, -1)[..., extra:], before


def _matrix(powers: Tensor, weight: Tensor) -> Tensor:
    """``K_{i−j}`` for the pairs of a chunk, (D, size, size)."""
    size = powers.shape[2] - 1
    kernel = (weight[..., None] * powers[..., :size]).sum(1)
    place = torch.arange(size, device=kernel.device)
    return kernel[:, (place[:, None] - place).clamp(min=0)].tril()


def _recurrent(x: Tensor, log_decay: Tensor, weight: Tensor, before: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for i in range(x.shape[2]):
        after = log_decay.exp() * before + x[:, :, i, None]
        before = torch.where(real[:, i, None, None], after, before)
        outputs.append((weight * before).sum(-1))
    return torch.stack(outputs, dim=2), before


def _check(x: Tensor, log_decay: Tensor, weight: Tensor, state: Tensor | None, mask: Tensor | None) -> None:
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"x must be (batch, tokens, dim), of one token at least, got {tuple(x.shape)}")
    if weight.ndim != 2 or log_decay.shape != weight.shape or len(weight) != x.shape[2]:
        raise ValueError(
            f"log_decay and weight must be of one shape ({x.shape[2]}, exponentials) for x of {tuple(x.shape)}, "
            f"got {tuple(log_decay.shape)}, {tuple(weight.shape)}"
        )
    shape = (x.shape[0], *weight.shape)
    if state is not None and state.shape != shape:
        raise ValueError(f"the state must be of shape {shape}, got {tuple(state.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(f"mask must be boolean, of shape {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")


class LongConvolution(Module):
    """``y = K * x`` with ``K_t = Σ_m γ_m (1 − e^{g_m}) e^{t g_m} / √M + ω [t = 0]``: moving averages, and the token itself.

    As in Mega, each exponential is an average of the past, weighed by how long it remembers: kernels neither grow with
    the text nor need regularisation. The exponentials begin with lifetimes from 2 to ``lifetime`` tokens, evenly on the
    logarithm's scale. Both branches are convolutions, and `kernel` merges them into one.

    The state is M numbers a channel, (B, dim, M).

    Args:
        dim: of the tokens.
        exponentials: M.
        lifetime: of the slowest, at the beginning, in tokens.

    >>> import torch
    >>> convolution, x = LongConvolution(8), torch.randn(2, 10, 8)
    >>> whole, _ = convolution(x)
    >>> first, state = convolution(x[:, :6])
    >>> rest, _ = convolution(x[:, 6:], state)
    >>> bool(torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5))
    True
    """

    def __init__(self, dim: int, exponentials: int = 8, lifetime: float = 2048.0) -> None:
        super().__init__()
        if exponentials < 1:
            raise ValueError(f"LongConvolution: exponentials must be at least 1, got {exponentials}")
        if lifetime < 2:
            raise ValueError(f"LongConvolution: lifetime must be at least 2 tokens, got {lifetime}")
        lifetimes = torch.linspace(math.log(2), math.log(lifetime), exponentials)
        self.log_rate = without_weight_decay(Parameter(-lifetimes.repeat(dim, 1)))
        self.weight = Parameter(torch.randn(dim, exponentials))
        self.skip = Parameter(torch.ones(dim))

    def forward(
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, form: Form = "chunked"
    ) -> tuple[Tensor, Tensor]:
        """The convolved tokens (B, N, dim), and the state that goes on; padding comes first, as in `Mixer.mix`."""
        convolved, after = long_convolution(x, *self._exponentials(), state, mask, form=form)
        return convolved + self.skip * x, after

    def kernel(self, length: int) -> Tensor:
        """Both branches as one kernel, (dim, length), the present first."""
        log_decay, weight = self._exponentials()
        kernel = (weight[..., None] * (log_decay[..., None] * torch.arange(length, device=weight.device)).exp()).sum(1)
        return kernel + functional.pad(self.skip[:, None], (0, length - 1))

    def _exponentials(self) -> tuple[Tensor, Tensor]:
        log_decay = -self.log_rate.exp()
        return log_decay, -self.weight * log_decay.expm1() / self.weight.shape[1] ** 0.5
