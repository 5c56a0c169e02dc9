"""How widely each query spreads its attention."""

from torch import Tensor

from regard.calls import AttentionCall
from regard.maps import AttentionMap
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

    def ask(self, attention: AttentionMap, call: AttentionCall) -> None:
        """Have it computed in the shared pass."""
        attention.expect("entropy")

    def measure(self, attention: AttentionMap, call: AttentionCall) -> Tensor:
        """(B, H, N)."""
        return attention.entropy()
