"""What a mixer remembers of a text, as a value: moved, cut off from its graph, reordered, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.serialization import add_safe_globals

CONTEXT = "context"
"""Among the arguments of a state that began with one."""


@dataclass(frozen=True)
class State:
    """What a mixer remembers of the tokens so far: tensors with a row for each text, by name.

    A state is a value: no call changes it, so that a text may go on from it in several ways. ``torch.save`` and
    ``torch.load`` keep it; a process that loads one must have imported ``regard.mixers``.

    Args:
        mixer: the name of the class whose state it is.
        tensors: by name.
        seen: tokens of the text so far, padding among them.
        dtype: of the tokens that were read.
        arguments: those with which the mixer was made, as text; it goes on in a layer of the same ones.

    >>> import io, torch
    >>> from regard.mixers import DeltaRule
    >>> mixer, x = DeltaRule(32, heads=4), torch.randn(2, 10, 32)
    >>> _, state = mixer(x)
    >>> beams = state.reorder(torch.tensor([0, 0, 1]))
    >>> mixer(torch.randn(3, 1, 32), beams)[0].shape
    torch.Size([3, 1, 32])
    >>> file = io.BytesIO()
    >>> torch.save(state.detach(), file)
    >>> _ = file.seek(0)
    >>> torch.load(file).seen
    10
    """

    mixer: str
    tensors: Mapping[str, Tensor]
    seen: int
    dtype: torch.dtype
    arguments: Mapping[str, str]

    @property
    def of_context(self) -> bool:
        """Whether it holds a context, at which the tokens look instead of one another."""
        return CONTEXT in self.arguments

    @property
    def bytes(self) -> int:
        """What it takes for one text."""
        return sum(tensor.numel() * tensor.element_size() // max(len(tensor), 1) for tensor in self.tensors.values())

    @property
    def texts(self) -> int:
        """The number of texts."""
        return len(next(iter(self.tensors.values()), ()))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """On another device, for tokens of another dtype, or both; what counts is left whole."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return replace(self._changed(moved), dtype=dtype or self.dtype)

    def detach(self) -> State:
        """Cut off from the graph of the calls that made it, as truncated backpropagation wants it."""
        return self._changed(Tensor.detach)

    def reorder(self, index: Tensor) -> State:
        """The rows of these texts, in this order, any of them more than once: as beams go on from one another.

        Raises:
            ValueError: an index that is no vector of whole numbers.
            IndexError: one that names a text which is not there.
        """
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"reorder takes a vector of texts' numbers, got {index.dtype} {tuple(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.texts:
            raise IndexError(f"the state is of {self.texts} texts; reorder was given {index.tolist()}")
        return self._changed(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> State:
        return replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})


add_safe_globals([State])
