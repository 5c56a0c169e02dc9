"""The dynamical-systems view: linear mixers as rows of one table of decays, input maps and output maps.

    h_i = Λ_i h_{i−1} + b_i v_iᵀ,    y_i = h_iᵀ c_i

=====================  ===============================  ==========================  ===========================
mechanism              Λ_i (of S)                       b_i                         c_i
=====================  ===============================  ==========================  ===========================
linear attention       1, S = Dk                        k_i                         q_i
with decay             exp g_i                          k_i                         q_i
normalised             1                                φ(k_i)                      φ(q_i) / Σ_j φ(q_i)·φ(k_j)
Taylor features        1, S = 1 + D + D (D + 1) / 2     Taylor(k_i)                 Taylor(q_i) / Σ_j …
softmax attention      1, S infinite                    all powers of k_i           those of q_i / Σ_j exp q_i·k_j
lightning attention    λ of the head                    k_i                         q_i
LightNet               exp(z_{i−1} − z_i), z_i the log  exp(k_i − z_i)              q_i
                       of Σ_{j≤i} exp k_j
FAST                   1, S = all products of D         φ(k_i)                      φ(q_i) / Σ_j φ(q_i)·φ(k_j)
delta rule             I − β_i k_i k_iᵀ                 β_i k_i                     q_i
gated delta rule       α_i (I − β_i k_i k_iᵀ)           β_i k_i                     q_i
selective state space  exp(−Δ_i a), each channel alone  Δ_i b(x_i)                  c(x_i)
=====================  ===============================  ==========================  ===========================

What differs is how large the state is, whether it forgets, whether what it forgets depends on the token (Λ and b of one Δ, in
selective state spaces) or on the key (the delta rule), and what the output is divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DynamicalSystem:
    """A mixer's row for given tokens: what its state goes through at each of them.

    Args:
        transition: Λ, diagonal (B, H, N, S), or whole matrices (B, H, N, S, S).
        into: b, (B, H, N, S), by which a value enters the state.
        out: c, (B, H, N, S), by which the state is read.

    Raises:
        ValueError: maps of different batches, heads, tokens or states.

    J. Sieber et al. (2024), Understanding the Differences in Foundation Models: Attention, State Space Models, and Recurrent
    Neural Networks.

    >>> import torch
    >>> from regard.mixers.linear import linear_attention
    >>> q, k, v = torch.randn(3, 1, 2, 30, 4)
    >>> system = DynamicalSystem(torch.full((1, 2, 30, 4), 0.9), k, q)
    >>> y, state = system.run(v)
    >>> decayed, _ = linear_attention(q, k, v, torch.tensor([0.9, 0.9]).log())
    >>> bool(torch.allclose(y.float(), decayed, atol=1e-4))
    True
    """

    transition: Tensor
    into: Tensor
    out: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.into.shape)
        fits = tuple(self.transition.shape) in (shape, (*shape, shape[-1]))
        if len(shape) != 4 or not fits or tuple(self.out.shape) != shape:
            raise ValueError(
                "a dynamical system needs into and out of one shape (batch, heads, tokens, state), and a transition of that "
                f"shape or with the state once more, got {shape}, {tuple(self.out.shape)}, {tuple(self.transition.shape)}"
            )

    @property
    def state_size(self) -> int:
        """S, for each value channel of each head."""
        return int(self.into.shape[-1])

    def run(self, values: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token by token, in float64: outputs (B, H, N, Dv) from values (B, H, N, Dv), and the state after them."""
        values, into, out, transition = (t.double() for t in (values, self.into, self.out, self.transition))
        shape = (*into.shape[:2], self.state_size, values.shape[-1])
        state = values.new_zeros(shape) if state is None else state.double()
        outputs = []
        for i in range(values.shape[2]):
            step = transition[:, :, i]
            kept = step @ state if step.ndim == 4 else step[..., None] * state
            state = kept + into[:, :, i, :, None] * values[:, :, i, None]
            outputs.append((out[:, :, i, None] @ state).squeeze(2))
        return torch.stack(outputs, dim=2), state

    def matrix(self) -> Tensor:
        """``Φ_ij = c_i · Λ_i … Λ_{j+1} b_j``, the attention matrix that the system hides, (B, H, N, N), in float64."""
        batch, heads, tokens, _ = self.into.shape
        one_hot = torch.eye(tokens, dtype=torch.float64, device=self.into.device).expand(batch, heads, -1, -1)
        return self.run(one_hot)[0]
