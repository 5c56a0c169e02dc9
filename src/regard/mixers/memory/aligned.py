"""Tokens moved so that the chunks of all texts begin together, wherever in a chunk each text was left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Aligned:
    """Slots for the tokens of each text: its first comes at its position, padding has none.

    Where no text has padding and all were left at one place, zeros are put around them, and that is all. Compiled code cannot
    ask which place that is: after a state it has slots for the latest, at most a chunk more than there need be.

    Args:
        x: tokens, (B, H, N, ...).
        position: (B,), the tokens of its chunk that each text has read, or None where all begin.
        real: (B, N), false for padding, or None where there is none.
        chunk: tokens of a chunk.

    >>> import torch
    >>> real = torch.tensor([[True, True, True], [False, True, True]])
    >>> tokens = torch.tensor([[1.0, 2, 3], [0, 4, 5]])[:, None, :, None]
    >>> aligned = Aligned(tokens, torch.tensor([0, 3]), real, chunk=4)
    >>> aligned.place(tokens)[:, 0, :, 0].tolist()
    [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0, 5.0, 0.0, 0.0, 0.0]]
    >>> bool((aligned.take(aligned.place(tokens)) == tokens)[real[:, None]].all())
    True
    """

    def __init__(self, x: Tensor, position: Tensor | None, real: Tensor | None, chunk: int) -> None:
        batch, length = len(x), x.shape[2]
        begin = torch.zeros(batch, dtype=torch.long, device=x.device) if position is None else position
        present = torch.ones(batch, length, dtype=torch.bool, device=x.device) if real is None else real
        self.ends = begin + present.sum(1)
        """(B,), the slot after each text's last token."""
        self.first, self.last = 0, length if position is None else length + chunk - 1
        """All tokens come from the first slot on, and before the last."""
        together = position is None
        if position is not None and not torch.compiler.is_compiling():
            self.first, latest = (int(place) for place in position.aminmax())
            self.last, together = latest + length, self.first == latest
        self.exact = together and real is None
        """Whether each text has a token at every slot between the two."""
        if not (self.exact or torch.compiler.is_compiling()):
            self.last = int(self.ends.max())
        self.slots = -(-self.last // chunk) * chunk
        """Their number: whole chunks."""
        self._slot = (begin[:, None] + present.cumsum(1) - 1).masked_fill(~present, self.slots)

    def filled(self, slot: int) -> Tensor | bool:
        """Which texts (B,) have all their slots before this one behind them; one answer, where it is that of all."""
        return self.last >= slot if self.exact else self.ends >= slot

    def place(self, tensor: Tensor) -> Tensor:
        """Tokens (B, H, N, ...) at their slots, (B, H, slots, ...), zeros at the others."""
        if self.exact:
            rest = (0, 0) * (tensor.ndim - 3)
            return functional.pad(tensor, (*rest, self.first, self.slots - self.last))
        index = self._slot.view(len(self._slot), 1, -1, *[1] * (tensor.ndim - 3)).expand_as(tensor)
        empty = tensor.new_zeros(*tensor.shape[:2], self.slots + 1, *tensor.shape[3:])
        return empty.scatter(2, index, tensor)[:, :, : self.slots]

    def take(self, tensor: Tensor) -> Tensor:
        """What is at the tokens' slots, (B, H, N, D), from (B, H, slots, D); anything for padding."""
        if self.exact:
            return tensor[:, :, self.first : self.last]
        index = self._slot.clamp(max=tensor.shape[2] - 1)[:, None, :, None]
        return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
