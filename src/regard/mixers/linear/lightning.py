"""Lightning attention: linear attention with one constant decay for each head, and the layer of TransNormerLLM around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Linear, Parameter, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.forms import Form, check_form, check_heads, initial_state
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._lrpe import positions_after, turn
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer

CHUNK = 64

Schedule = Literal["released", "paper"]
"""Of the decays: what the released models use, and the paper's equation 10."""


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    state: Tensor | None = None,
    *,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``S_i = λ S_{i−1} + k_i v_iᵀ,  o_i = S_iᵀ q_i``: `linear_attention` with a constant λ for each head.

    Within a block ``((Q Kᵀ) ∘ M) V`` with ``M_ij = λ^{i−j}`` below the diagonal, between blocks the state. On a GPU where
    Triton is installed, the chunked form of float32 and bfloat16 heads up to 128 wide is one kernel, gradients and states
    included; `chunk` is then its own, and a decay that is trained, which the paper's is not, takes the ordinary way.

    Args:
        query, key: (B, H, N, Dk); there is no scale, and no softmax.
        value: (B, H, N, Dv).
        decay: λ, (H,), above 0 and at most 1.
        state: S before the first token, (B, H, Dk, Dv); zeros by default.
        form: "parallel" the quadratic reference, "chunked" linear in N, "recurrent" token by token.
        chunk: tokens of a chunk.

    Returns:
        The output (B, H, N, Dv) in the values' dtype, and S after the last token, in float32 at least.

    Raises:
        ValueError: shapes that do not fit, or decays out of their range.

    Z. Qin et al. (2024), Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention; Z. Qin et al.
    (2024), Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)
    >>> output, state = lightning_attention(q, k, v, torch.tensor([0.9, 0.99]))
    >>> output.shape, state.shape
    (torch.Size([1, 2, 100, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_form(form)
    check_heads(query, key, value)
    _check_decay(decay, query.shape[1])
    log_decay = decay.to(torch.promote_types(query.dtype, torch.float32)).log()
    if form == "chunked" and query.is_cuda:
        from regard.mixers.linear import _lightning_kernel  # only here, for Triton takes its time to import

        if _lightning_kernel.fits(query, key, value, log_decay):
            return _lightning_kernel.sweep(query, key, value, initial_state(state, query, value), log_decay)
    return linear_attention(query, key, value, log_decay, state, form=form, chunk=chunk)


def _check_decay(decay: Tensor, heads: int) -> None:
    if decay.shape != (heads,):
        raise ValueError(f"decay must be of shape ({heads},), one for each head, got {tuple(decay.shape)}")
    # On a GPU looking at the numbers would make the processor wait for it.
    if (
        decay.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not bool(((decay > 0) & (decay <= 1)).all())
    ):
        raise ValueError(f"decay must be above 0 and at most 1, got {decay.tolist()}")


def lightning_decay(heads: int, layer: int = 0, layers: int = 1, schedule: Schedule = "released") -> Tensor:
    """λ of each head of a layer: (heads,). Early layers forget soon, late ones hardly.

    "released" is ``exp(−s_h (1 − l / (L − 1) + 10⁻⁵))`` with ALiBi's ``s_h = 2^{−8h/H}``, h = 1 … H and l = 0 … L − 1, as
    the published models have it. "paper" is equation 10, ``exp(−(8h/H)(1 − l/L))``; where h and l begin it does not say, so
    that they do here as in the other. Its first layers forget all within a few tokens: the other is the default.

    Args:
        heads: H.
        layer: l, from 0.
        layers: L.
        schedule: either.

    Raises:
        ValueError: no such layer or schedule.

    >>> lightning_decay(2, layer=0, layers=12)
    tensor([0.9394, 0.9961])
    >>> lightning_decay(2, layer=11, layers=12)
    tensor([1.0000, 1.0000])
    """
    return (-_rates(heads, layer, layers, schedule)).exp()


def _rates(heads: int, layer: int, layers: int, schedule: Schedule) -> Tensor:
    """−log λ: (heads,)."""
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {schedule!r}")
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be from 0 to layers − 1, got layer={layer} and layers={layers}")
    if schedule == "paper":
        return 8 * torch.arange(1, heads + 1) / heads * (1 - layer / layers)
    return torch.tensor(_slopes(heads)) * (1 - layer / max(layers - 1, 1) + 1e-5)


def _slopes(heads: int) -> list[float]:
    """ALiBi's slopes; of another number than a power of two, those of the power below and then every other of the next."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * head / power) for head in range(1, power + 1)]
    between = [2 ** (-4 * head / power) for head in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


class LightningAttention(ValueMixer):
    """The token mixer of TransNormerLLM: ``[norm(O) ∘ (x U)] W``, queries and keys under SiLU, values and gate as they are.

    The norm is SRMSNorm, an RMS norm of all heads together without a gain. In the first layer queries and keys are turned
    by learned angles (LRPE-d), which doubles that layer's state.

    Args:
        dim: of the tokens.
        heads: that divide it.
        layer, layers: which of how many layers this is, for the decays; see `lightning_decay`.
        schedule: of the decays, "released" or "paper".
        turned: whether to turn queries and keys; by default in layer 0 only, as in the paper.

    Z. Qin et al. (2024), Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention.

    >>> import torch
    >>> mixer, x = LightningAttention(32, heads=4, layer=1, layers=8), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, step.shape, state.tensors["memory"].shape
    (torch.Size([2, 10, 32]), torch.Size([2, 32]), torch.Size([2, 4, 8, 8]))
    """

    facts: ClassVar[Facts] = Facts(
        paper="Z. Qin et al. (2024), Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        formula="S_i = λ S_{i−1} + k_i v_iᵀ,  o_i = S_iᵀ q_i",
        time="O(N D²/H)",
        state="2 D²/H in layer 0, else D²/H",
    )
    rates: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        layer: int = 0,
        layers: int = 1,
        schedule: Schedule = "released",
        turned: bool | None = None,
    ) -> None:
        super().__init__(dim)
        check_divides(type(self).__name__, dim, heads)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (Linear(dim, dim, bias=False) for _ in range(4))
        self.o_proj = Linear(dim, dim, bias=False)
        # The rates and not the decays: near 1 those of late heads would be one and the same in bfloat16.
        self.register_buffer("rates", _rates(heads, layer, layers, schedule))
        self.theta: Parameter | None = None
        if turned if turned is not None else layer == 0:
            self.theta = Parameter((10000 ** (-2 * torch.arange(dim) / dim)).view(heads, -1))

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries and keys under SiLU, turned where they are, values, and the output's gate."""
        query, key, value = heads_of(x, self.heads, self.q_proj, self.k_proj, self.v_proj)
        query, key, after = functional.silu(query), functional.silu(key), {}
        if self.theta is not None:
            places = positions_after(None if state is None else state["position"], x, layout.mask)
            angles = places[:, None, :, None] * self.theta[:, None].float()
            query, key, after = turn(query, angles), turn(key, angles), {"position": places[:, -1] + 1}
        return Projected(value, {"query": query, "key": key, "gate": self.g_proj(x)}, after)

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Lightning attention; padding that comes between a state and the tokens must not decay it."""
        memory, rates = None if state is None else state["memory"], self.rates.float()
        query, key, value = projected["query"], projected["key"], projected.value
        if layout.mask is None or memory is None:
            mixed, after = lightning_attention(query, key, value, (-rates).exp(), memory)
        else:
            mixed, after = linear_attention(query, key, value, -rates[:, None] * layout.mask[:, None], memory)
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """A norm of all heads, the gate, and the output's projection."""
        joined = join_heads(mixed)
        y: Tensor = self.o_proj(functional.rms_norm(joined, joined.shape[-1:], eps=1e-6) * projected["gate"])
        return y

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = λ, b = k, c = q``."""
        projected = self.project(x)
        key, decay = projected["key"], (-self.rates.float()).exp()
        return DynamicalSystem(decay[:, None, None].expand_as(key), key, projected["query"])
