"""Every query sees the keys up to itself."""

from __future__ import annotations

from regard.masks._window import Window


def causal() -> Window:
    """Query i sees keys j ≤ i: the window without an end to the left.

    >>> from regard import masks
    >>> masks.causal().dense(1, 1, 3, 4)[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0]], dtype=torch.int32)
    """
    return Window(left=None, right=0)
