"""A small transformer, and itself by matrices that are stored and that gradients reach."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import GELU, Linear, Module, ModuleList, Sequential
from torch.nn.functional import scaled_dot_product_attention

DIM, WIDTH = 12, 3


class Kind(NamedTuple):
    """How a tiny model attends."""

    heads: int = 4
    key_heads: int = 2
    layers: int = 3
    causal: bool = True


class Layer(Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.q_proj = Linear(DIM, kind.heads * WIDTH)
        self.k_proj, self.v_proj = (Linear(DIM, kind.key_heads * WIDTH) for _ in range(2))
        self.o_proj = Linear(kind.heads * WIDTH, DIM)
        self.mlp = Sequential(Linear(DIM, DIM), GELU(), Linear(DIM, DIM))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (proj(x).unflatten(-1, (-1, WIDTH)).mT for proj in (self.q_proj, self.k_proj, self.v_proj))
        return 3 * query.permute(0, 3, 1, 2), key.permute(0, 3, 1, 2), value.permute(0, 3, 1, 2)

    def after(self, x: Tensor, output: Tensor) -> Tensor:
        x = x + self.o_proj(output.transpose(1, 2).flatten(2))
        return x + self.mlp(x)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        output = scaled_dot_product_attention(
            *self.heads_of(x), attn_mask=mask, is_causal=self.kind.causal and mask is None, enable_gqa=True
        )
        return self.after(x, output)


class Tiny(Module):
    """Layers of attention and MLPs in float64, from (batch, tokens, 12) to logits (batch, tokens, 12)."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind = kind
        self.layers = ModuleList(Layer(kind) for _ in range(kind.layers))
        self.double().eval()

    def mask(self, tokens: int, real: Tensor | None) -> Tensor | None:
        """(batch, 1, tokens, tokens): which keys are real and not later."""
        if real is None:
            return None
        visible = real[:, None, None, :].expand(-1, 1, tokens, -1)
        return visible.tril() if self.kind.causal else visible

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        mask = self.mask(x.shape[1], real)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def stored(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and each layer's matrix (batch, heads, tokens, tokens), through which it was made."""
        tokens, matrices = x.shape[1], []
        mask = self.mask(tokens, real)
        if mask is None and self.kind.causal:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for layer in self.layers:
            query, key, value = layer.heads_of(x)
            groups = self.kind.heads // self.kind.key_heads
            logits = query @ key.repeat_interleave(groups, 1).mT / WIDTH**0.5
            logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
            matrix = logits.softmax(-1).nan_to_num(0.0)
            matrices.append(matrix)
            x = layer.after(x, matrix @ value.repeat_interleave(groups, 1))
        return x, matrices
