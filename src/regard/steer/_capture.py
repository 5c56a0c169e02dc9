"""Keep what attention calls of another run look at and put out, for edits that bring it into this one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import TracebackType

from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, Entry, HiddenCall, Proceed


@dataclass(frozen=True)
class Captured:
    """What is kept of one call: ``key`` and ``value`` (batch, key heads, keys, width), and where they were asked for the
    ``output`` of each head (batch, heads, queries, width) and the ``call`` with its queries and mask. ``start`` is the
    position of its first query.
    """

    start: int
    key: Tensor
    value: Tensor
    output: Tensor | None = None
    call: AttentionCall | None = None


def check_source(edit: object, source: object) -> None:
    """Refuse what is no captured run, as from a recipe or a command line, which cannot hold one.

    Raises:
        TypeError: another thing.
    """
    if not isinstance(source, capture):
        raise TypeError(
            f"{type(edit).__name__} needs source to be a run that regard.capture kept, in Python, got {type(source).__name__}"
        )


class capture(Entry):  # noqa: N801 - a context manager, named as what one writes
    """Keep what every attention call that a model makes in the block looks at, for `Mutual`, `PatchOutput` and `PatchMap`.

    Keys and values are always kept. What is kept is the run's with the edits of blocks around this one, the outputs with
    those of blocks inside it too. It is detached from the model's graph.

    Args:
        model: as for `regard.steer`.
        outputs: keep what each head puts out, before the heads are mixed, for `PatchOutput`.
        maps: keep the queries and masks too, from which `PatchMap` has the attention matrix; it is never stored.

    Raises:
        RuntimeError: at the end of a block in which no attention call was seen.

    >>> import torch, regard
    >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(1, 5, 8)
    >>> with torch.no_grad(), regard.capture(layer, outputs=True) as source:
    ...     _ = layer(x, x, x)
    >>> source
    capture of MultiheadAttention
    >>> source.at("MultiheadAttention").output.shape
    torch.Size([1, 2, 5, 4])
    """

    def __init__(self, model: Module | None, *, outputs: bool = False, maps: bool = False) -> None:
        self._model = model
        self._outputs = outputs
        self._maps = maps
        self._kept: dict[str, dict[int, Captured]] = {}

    def __enter__(self) -> capture:
        self._kept.clear()
        self.enter(self._model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        if kind is None:
            self.check()

    def __repr__(self) -> str:
        return f"capture of {', '.join(self._kept) or 'nothing yet'}"

    @property
    def paths(self) -> list[str]:
        """The paths of the calls that were captured."""
        return list(self._kept)

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """Keep what the call is and puts out; a mixer has no keys to keep."""
        output = proceed(call)
        if isinstance(call, AttentionCall):
            apart = call.detached()
            self._kept.setdefault(call.place.path, {})[call.place.pass_index] = Captured(
                call.place.query_start,
                apart.key,
                apart.value,
                output.detach() if self._outputs else None,
                replace(apart, readings=()) if self._maps else None,
            )
        return output

    def at(self, path: str, pass_index: int = 0) -> Captured:
        """What was kept of the call of this path in this pass, or in the one pass that was captured.

        Raises:
            ValueError: nothing was captured there.
        """
        kept = self._kept.get(path)
        if not kept:
            raise ValueError(f"nothing was captured of {path}; captured were {', '.join(self._kept) or 'no calls'}")
        if len(kept) == 1:
            return next(iter(kept.values()))
        if pass_index not in kept:
            raise ValueError(f"{len(kept)} passes of {path} were captured, but this is pass {pass_index + 1}")
        return kept[pass_index]
