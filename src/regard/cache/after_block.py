"""A compressed cache read after its block: each layer that is asked for has its one call of attention come by."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regard.cache.kept_call import KeptCall
from regard.runtime import AttentionCall, Proceed, Site, Stack, entered

if TYPE_CHECKING:
    from regard.cache.layer import KeptLayer


class AfterBlock:
    """Answers the call of attention that follows an update of a layer, over what is left of it, and drops nothing."""

    edits = outermost = True

    def __init__(self, layer: KeptLayer) -> None:
        frames = Stack().frames
        if not frames:
            raise RuntimeError(
                "this cache was compressed: outside regard.compress(model, policy) it is read by a model alone"
            )
        self._layer = layer
        self._exit = ExitStack()
        self._exit.enter_context(entered(self, frames[0].module))
        self.is_open = True

    def close(self) -> None:
        """Leave calls alone again."""
        self.is_open = False
        self._exit.close()

    def wants(self, site: Site) -> bool:
        """The next call, whatever it is."""
        return self.is_open

    def intercept(self, call: Any, proceed: Proceed, alone: bool) -> Tensor:
        """The output over what is left."""
        self.close()
        if not isinstance(call, AttentionCall) or call.is_stored:
            return proceed(call)
        kept = KeptCall(None, self._layer, call, self._layer.new)
        self._layer.new = 0
        if kept.is_whole:
            return proceed(call)
        return kept.attend() if alone and not call.readings else proceed(kept.restore())
