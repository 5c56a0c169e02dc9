"""CHELA: a short and a long convolution find what is near and what is far, and linear attention selects from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.nn import Linear, RMSNorm, functional

from regard.mixers.dynamical_system import DynamicalSystem
from regard.mixers.layout import PLAIN, Layout
from regard.mixers.linear._linear_attention import linear_attention
from regard.mixers.linear._long_convolution import LongConvolution
from regard.mixers.linear.mega_gate import MegaGate
from regard.mixers.linear.short_convolution import ShortConvolution
from regard.mixers.mixer import Facts, check_divides, heads_of, join_heads
from regard.mixers.projected import Projected
from regard.mixers.value_mixer import ValueMixer


class CHELA(ValueMixer):
    """The layer: ``z = LongConv(SiLU(ShortConv(x)))``, queries and keys from z, linear attention in chunks, gates from z.

    The order of the convolutions, attention by divide and conquer, and a gate that brings the convolutions' view of the whole
    to the attention are the paper's. The rest is chosen here, in the manner of Mega, the layer family to which CHELA
    belongs: ``q, k = SiLU(W z)``; values ``SiLU(W x)`` of the layer's input; no decay and no normaliser,
    but an RMS norm of each head's output; `MegaGate`. The long kernel is a sum of exponentials (`LongConvolution`):
    a free one has no finite state, and this one decodes exactly. Of the paper's structural reparameterisation the
    long kernel's branch for the token itself remains, merged by `LongConvolution.kernel`.

    Its state is ``dim² / heads + (exponentials + convolution − 1) dim`` numbers for each text.

    Args:
        dim: of the tokens.
        heads: that divide it.
        convolution: tokens that the short convolution sees.
        exponentials: of the long convolution's kernel, for each channel.

    Z. Liu et al. (2024), Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences;
    X. Ma et al. (2023), Mega: Moving Average Equipped Gated Attention.

    >>> import torch
    >>> mixer, x = CHELA(32, heads=4), torch.randn(2, 10, 32)
    >>> y, state = mixer(x)
    >>> step, state = mixer.decode(torch.randn(2, 32), state)
    >>> y.shape, step.shape, state.seen
    (torch.Size([2, 10, 32]), torch.Size([2, 32]), 11)
    """

    facts: ClassVar[Facts] = Facts(
        paper="Z. Liu et al. (2024), Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long "
        "Sequences, ICML, arXiv 2406.08128",
        formula="z = LongConv(SiLU(ShortConv(x))),  S_i = S_{i−1} + k_i v_iᵀ,  o_i = S_iᵀ q_i with q, k from z, gated by z",
        time="O(N D²/H)",
        state="D²/H + (M + K − 1) D",
    )

    def __init__(self, dim: int, heads: int = 4, convolution: int = 4, exponentials: int = 8) -> None:
        super().__init__(dim)
        check_divides(type(self).__name__, dim, heads)
        self.heads = heads
        self.short = ShortConvolution(dim, convolution)
        self.long = LongConvolution(dim, exponentials)
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        self.norm = RMSNorm(dim // heads, eps=1e-5)
        self.gate = MegaGate(dim)

    def project(self, x: Tensor, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN) -> Projected:
        """Queries and keys behind both convolutions, values of the tokens themselves; padding's values are zeros."""
        tail, far = (None, None) if state is None else (state["tail"], state["far"])
        near, tail = self.short(x, tail, layout.mask)
        convolved, far = self.long(near, far, layout.mask)
        query, key = heads_of(convolved, self.heads, self.q_proj, self.k_proj)
        (value,) = heads_of(x, self.heads, self.v_proj)
        parts = {"query": functional.silu(query), "key": functional.silu(key), "convolved": convolved}
        return Projected(functional.silu(value), parts, {"tail": tail, "far": far})

    def combine(
        self, projected: Projected, state: Mapping[str, Tensor] | None = None, layout: Layout = PLAIN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Linear attention without decay."""
        before = None if state is None else state["memory"]
        mixed, after = linear_attention(projected["query"], projected["key"], projected.value, state=before)
        return mixed, {"memory": after}

    def out(self, mixed: Tensor, projected: Projected) -> Tensor:
        """Each head's norm, and the gate of the convolutions."""
        y: Tensor = self.gate(projected["convolved"], join_heads(self.norm(mixed)))
        return y

    def system(self, x: Tensor) -> DynamicalSystem:
        """``Λ = 1, b = k, c = q``."""
        projected = self.project(x)
        key = projected["key"]
        return DynamicalSystem(key.new_ones(1, 1, 1, key.shape[3]), key, projected["query"])
