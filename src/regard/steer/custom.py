"""An edit that is a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer.edit import Edit


@dataclass(frozen=True, repr=False)
class Custom(Edit):
    """Whatever a function makes of the call.

    Args:
        function: from the `AttentionCall` and the chosen heads, booleans (Hq,) or of length 1 for all, to another call:
            ``dataclasses.replace(call, query=…)``, with further ``columns``, ``factors`` or a ``gate``.

    Raises:
        TypeError: no function; or what it returns is no `AttentionCall`.

    >>> import dataclasses, torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> q, k, v = torch.randn(3, 1, 1, 3, 4)
    >>> with regard.steer(None, regard.Custom(lambda call, heads: dataclasses.replace(call, value=-call.value))):
    ...     steered = attention(q, k, v)
    >>> bool(torch.allclose(steered, -attention(q, k, v)))
    True
    """

    function: Callable[[AttentionCall, Tensor], AttentionCall]

    def __post_init__(self) -> None:
        """Refuse what cannot be called, as from a command line."""
        if not callable(self.function):
            raise TypeError(f"Custom needs a function, in Python, got {self.function!r}")

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """What the function says."""
        edited = self.function(call, heads)
        if not isinstance(edited, AttentionCall):
            raise TypeError(f"Custom's function must return an AttentionCall, got {type(edited).__name__}")
        return edited
