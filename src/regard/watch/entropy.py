"""How widely each query spreads its attention."""

from collections.abc import Callable

from torch import Tensor

from regard.maps import TokenMap
from regard.runtime import Call
from regard.watch.statistic import Statistic


class Entropy(Statistic):
    """``H_i = −Σ_j P_ij log P_ij``, in nats: ``entropy(layer, batch, head, query)``.

    0 where a query looks at one key only, log M where it looks at all M alike.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(16, 2).eval()
    >>> x = torch.randn(5, 16)
    >>> with torch.no_grad(), regard.watch(layer, regard.Entropy()) as seen:
    ...     _ = layer(x, x, x)
    >>> seen.dataset().entropy.shape
    (1, 1, 2, 5)
    """

    name = "entropy"
    dims = ("query",)
    units = "nats"

    def ask(self, attention: TokenMap, call: Call) -> Callable[[], Tensor]:
        """Have it computed in the shared pass: (B, H, N)."""
        attention.expect("entropy")
        return attention.entropy
