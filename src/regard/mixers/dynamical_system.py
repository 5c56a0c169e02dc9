"""The dynamical-systems view: mixers as rows of one table, by what keeps, writes and reads a state that is linear in values.

    h_i = Λ_i h_{i−1} + b_i v_iᵀ,    y_i = h_iᵀ c_i

`Mixer.system` makes a mixer's row for given tokens, exactly: Λ, b and c are functions of them, values are what goes through.

========================  ==========================  ====================  =================  ===========================
mechanism                 Λ_i                         S                     b_i                c_i
========================  ==========================  ====================  =================  ===========================
linear_attention          exp g_i                     D                     k_i                q_i
CHELA                     1                           D                     k_i                q_i
LightningAttention        λ of the head               2 D, D if not turned  k_i                q_i
LightNet                  exp(z_{i−1} − z_i)          2 D                   exp(k_i − z_i)     q_i
TaylorAttention           1                           1 + F + F (F + 1)/2   φ(k_i)             φ(q_i) / Σ_j φ(q_i)·φ(k_j)
FAST, of order 2          1                           1 + D + D (D + 1)/2   φ(k_i)             φ(q_i) / Σ_j φ(q_i)·φ(k_j)
GatedLinearAttention      α_i of each channel         D                     k_i                q_i
SelectiveSSM              exp(−Δ_i a)                 states                Δ_i b(x_i)         c(x_i)
DeltaRule                 I − β_i k_i k_iᵀ            D                     β_i k_i            q_i
GatedDeltaRule            α_i (I − β_i k_i k_iᵀ)      D                     β_i k_i            q_i
Miras, a matrix           held, start                 2 D                   θ_i [k_i, 0]       [q_i, 0]
LongTermMemory, a matrix  held, start, surprise       3 D                   θ_i [k_i, 0, k_i]  [q_i, 0, 0]
SlidingWindow             a shift of slots            W                     e_W                softmax over the slots
LongVQ                    a shift of slots into sums  W + codes             e_W                softmax over slots and sums
Based                     of both halves              the larger            of both halves     of both halves
SoftmaxAttention          1                           N                     e_i                row i of P
ChunkedSoftmaxAttention   1                           N                     e_i                row i of P
AdaptiveFilterAttention   1                           N                     e_i                row i of P
========================  ==========================  ====================  =================  ===========================

D is a head's width, N the tokens, W the window, F the features of a query, φ(q)·φ(k) a polynomial in place of exp q·k, and
z_i the log of Σ_{j≤i} exp k_j. The channels of SelectiveSSM are heads, of one value each. Keys and queries that are turned by
their positions are so before all this, and twice as wide where S says so.

What differs is how large the state is, whether it forgets, whether what it forgets depends on the token (Λ and b of one Δ, in
selective state spaces) or on the key (the delta rules), and what the output is divided by.

- Softmax attention, as one system for any tokens, has a state without end: all powers of k_i. For N given tokens a slot for
  the value of each will do, a state that grows with the text, as a cache of keys and values does. The logits of the adaptive
  filter are no finite sum of products of queries and keys either; damping and gate are in its P.
- A window needs a slot for each of its tokens. What leaves LongVQ's goes to the sum of its code, since from there on keys of
  one code are one, and the softmax counts a sum once for each token in it.
- A memory takes its gradients at the weights of the chunk's start, so that these belong to the state. With the step θ, the
  decay a = 1 − α and the momentum η of token i, what is held, the start and the surprise go through

      ⎡ a I   −θ k kᵀ   η I ⎤
      ⎢  0       I       0  ⎥
      ⎣  0    −θ k kᵀ   η I ⎦

  and at a chunk's last token the second row is the first, in b too: what is held is the next start. Without momentum there is
  no surprise, and Λ is the upper left. With the bias of a dot product −θ k kᵀ is 0, which leaves linear attention with decay.
  The state begins with what the layer has learned to hold at first, `DynamicalSystem.before`.

What is no linear system, and why:

- Miras and LongTermMemory where the memory is a network, as it is by default: values go into weights between non-linearities.
- Moneta: the slope r |r|^{p−2} of its loss is not linear in the error r, and what is held is divided by a norm of itself.
- Yaad: errors are cut at a threshold. Memora: weights are a softmax of what is held.
- MemoryAsContext, MemoryAsGate and MemoryAsLayer: memory and attention have values of their own, and one is given, or
  multiplied by, what the other gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DynamicalSystem:
    """A mixer's row for given tokens: what its state goes through at each of them.

    Args:
        transition: Λ, diagonal (B|1, H|1, N|1, S), or whole matrices (B|1, H|1, N|1, S, S).
        into: b, (B, H, N, S), by which a value enters the state.
        out: c, (B, H, N, S), by which the state is read.
        before: h_0, (B, H, S, Dv), the state before the first token; zeros by default.

    Raises:
        ValueError: maps of different batches, heads, tokens or states.

    J. Sieber et al. (2024), Understanding the Differences in Foundation Models: Attention, State Space Models, and Recurrent
    Neural Networks.

    >>> import torch
    >>> from regard.mixers import linear_attention
    >>> q, k, v = torch.randn(3, 1, 2, 30, 4)
    >>> system = DynamicalSystem(torch.full((1, 1, 1, 4), 0.9), k, q)
    >>> y, state = system.run(v)
    >>> decayed, _ = linear_attention(q, k, v, torch.tensor([0.9, 0.9]).log())
    >>> bool(torch.allclose(y.float(), decayed, atol=1e-4))
    True
    """

    transition: Tensor
    into: Tensor
    out: Tensor
    before: Tensor | None = None

    def __post_init__(self) -> None:
        shape, steps = tuple(self.into.shape), tuple(self.transition.shape)
        fits = all(one in (1, full) for one, full in zip(steps[:3], shape, strict=False))
        whole = steps[3:] in (shape[3:], 2 * shape[3:])
        if len(shape) != 4 or not fits or not whole or tuple(self.out.shape) != shape:
            raise ValueError(
                "a dynamical system needs into and out of one shape (batch, heads, tokens, state), and a transition of that "
                "shape or with the state once more, in which batch, heads and tokens may be 1, got "
                f"{shape}, {tuple(self.out.shape)}, {steps}"
            )
        if self.before is not None:
            self._check_state("before", self.before, self.before.shape[-1])

    @property
    def state_size(self) -> int:
        """S, for each value channel of each head."""
        return int(self.into.shape[-1])

    def run(self, values: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token by token, in float64: outputs (B, H, N, Dv) from values (B, H, N, Dv), and the state after them.

        It begins with the state (B, H, S, Dv) if there is one, else with `before`.

        Raises:
            ValueError: values of other tokens, a state of another shape.
        """
        if values.ndim != 4 or values.shape[:3] != self.into.shape[:3]:
            raise ValueError(
                f"values must be ({', '.join(map(str, self.into.shape[:3]))}, width), got {tuple(values.shape)}"
            )
        width, values = values.shape[3], values.double()
        state = self.before if state is None else state
        if state is None:
            state = values.new_zeros(*self.into.shape[:2], self.state_size, width)
        self._check_state("the state", state, width)
        into, out, state = self.into.double(), self.out.double(), state.double()
        outputs = []
        for i in range(values.shape[2]):
            state = self._kept(state, i) + into[:, :, i, :, None] * values[:, :, i, None]
            outputs.append((out[:, :, i, None] @ state).squeeze(2))
        return torch.stack(outputs, dim=2), state

    def matrix(self) -> Tensor:
        """``Φ_ij = c_i · Λ_i … Λ_{j+1} b_j``, the attention matrix that the system hides, (B, H, N, N), in float64.

        What it gives for values is without what it gives for `before`.
        """
        batch, heads, tokens, size = self.into.shape
        one_hot = torch.eye(tokens, dtype=torch.float64, device=self.into.device).expand(batch, heads, -1, -1)
        return self.run(one_hot, one_hot.new_zeros(batch, heads, size, tokens))[0]

    def _kept(self, state: Tensor, i: int) -> Tensor:
        """What is kept of the state h at one step: ``Λ_i h``."""
        step = self.transition[:, :, min(i, self.transition.shape[2] - 1)].double()
        return step @ state if step.ndim == 4 else step[..., None] * state

    def _check_state(self, name: str, state: Tensor, width: int) -> None:
        expected = (*self.into.shape[:2], self.state_size, width)
        if state.shape != expected:
            raise ValueError(f"{name} must be of shape {expected}, got {tuple(state.shape)}")


def of_features(query: Tensor, key: Tensor, smallest: float) -> DynamicalSystem:
    """Linear attention of features, normalised: ``Λ = 1, b = φ(k), c = φ(q) / Σ_j φ(q)·φ(k_j)``.

    Args:
        query, key: φ(q) and φ(k), (B, H, N, S).
        smallest: that the sum is taken for where it is less.

    >>> import torch
    >>> of_features(*torch.rand(2, 1, 1, 5, 3), 1e-6).matrix().sum(-1).allclose(torch.ones(5, dtype=torch.float64))
    True
    """
    total = (query * key.cumsum(2)).sum(-1, keepdim=True).clamp(min=smallest)
    return DynamicalSystem(query.new_ones(1, 1, 1, query.shape[3]), key, query / total)
