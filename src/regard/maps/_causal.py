"""Some rows of a triangle."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_on(rows: Tensor) -> bool:
    """Whether these are neighbouring rows, from first to last."""
    return bool((rows.diff() == 1).all())


def triangle_rows(rows: Tensor, keys: int) -> Tensor:
    """Which keys j ≤ i neighbouring rows i see, the last row first: (1, 1, len(rows), keys) in the memory of one line.

    From the last row upwards each row sees what the one before it sees, moved by one key: entry (r, j) depends on r + j.
    """
    line = torch.arange(len(rows) + keys, device=rows.device) <= rows[-1]
    return line.as_strided((len(rows), keys), (1, 1))[None, None]
