"""Tokens moved so that the chunks of all texts begin together, wherever in a chunk each text was left."""

from __future__ import annotations

from torch import Tensor


class Aligned:
    """Slots for the tokens of each text: its first comes at its position, padding has none.

    Args:
        position: (B,), the tokens of its chunk that each text has read.
        real: (B, N), false for padding.
        chunk: tokens of a chunk.

    >>> import torch
    >>> real = torch.tensor([[True, True, True], [False, True, True]])
    >>> aligned = Aligned(torch.tensor([0, 3]), real, chunk=4)
    >>> tokens = torch.tensor([[1.0, 2, 3], [0, 4, 5]])[:, None, :, None]
    >>> aligned.place(tokens)[:, 0, :, 0].tolist()
    [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0, 0.0]]
    >>> bool((aligned.take(aligned.place(tokens)) == tokens)[real[:, None]].all())
    True
    """

    def __init__(self, position: Tensor, real: Tensor, chunk: int) -> None:
        self.ends = position + real.sum(1)
        """(B,), the slot after each text's last token."""
        self.last = int(self.ends.max())
        self.slots = -(-self.last // chunk) * chunk
        """Their number: whole chunks."""
        self._slot = (position[:, None] + real.cumsum(1) - 1).masked_fill(~real, self.slots)

    def place(self, tensor: Tensor) -> Tensor:
        """Tokens (B, H, N, ...) at their slots, (B, H, slots, ...), zeros at the others."""
        index = self._slot.view(len(self._slot), 1, -1, *[1] * (tensor.ndim - 3)).expand_as(tensor)
        empty = tensor.new_zeros(*tensor.shape[:2], self.slots + 1, *tensor.shape[3:])
        return empty.scatter(2, index, tensor)[:, :, : self.slots]

    def take(self, tensor: Tensor) -> Tensor:
        """What is at the tokens' slots, (B, H, N, D), from (B, H, slots, D); anything for padding."""
        index = self._slot.clamp(max=tensor.shape[2] - 1)[:, None, :, None]
        return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
