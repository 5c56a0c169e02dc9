"""Put what heads of another run computed in the place of what they compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.runtime import AttentionCall
from regard.steer._capture import Captured, capture, check_source
from regard.steer.edit import Edit, query_set
from regard.tokens import Where


@dataclass(frozen=True, repr=False)
class PatchOutput(Edit):
    """``O'_i = O_i`` of another run: its heads' outputs in place of one's own, position for position.

    Edits of the logits that come later do nothing to these rows, `Gate` and `AddToOutput` do.

    Args:
        source: what ``capture(model, outputs=True)`` kept of that run, which went through the same layers. If one pass was
            captured, it serves every pass; otherwise each pass has its own.
        queries: positions in the text; all by default.

    Raises:
        TypeError: a source that is no captured run.
        ValueError: a run without outputs; one that has another shape, or nothing of a chosen position.

    J. Vig et al. (2020), Investigating Gender Bias in Language Models Using Causal Mediation Analysis; K. Wang et al. (2023),
    Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 Small.

    >>> import torch, regard
    >>> from torch.nn.functional import scaled_dot_product_attention as attention
    >>> clean, corrupted = torch.randn(2, 3, 1, 2, 5, 8)
    >>> with regard.capture(None, outputs=True) as source:
    ...     wanted = attention(*clean)
    >>> with regard.steer(None, regard.PatchOutput(source, queries=-1, heads=1)):
    ...     patched = attention(*corrupted)
    >>> bool((patched[:, 1, -1] == wanted[:, 1, -1]).all()), bool((patched[:, 0] == wanted[:, 0]).any())
    (True, False)
    """

    source: capture
    queries: Where | None = None

    def __post_init__(self) -> None:
        check_source(self, self.source)

    def apply(self, call: AttentionCall, heads: Tensor) -> AttentionCall:
        """No output of its own, and another's added."""
        rows = query_set(self.queries, call, heads)
        kept = self.source.at(call.place.path, call.place.pass_index)
        if kept.output is None:
            raise ValueError(
                "PatchOutput needs what capture(model, outputs=True) keeps, but outputs were not asked for"
            )
        return put(call, rows, self._of_the_text(kept.output, kept, call, rows))

    def _of_the_text(self, output: Tensor, kept: Captured, call: AttentionCall, rows: Tensor) -> Tensor:
        """The captured outputs at the positions of the call's queries; zeros where there are none and none are wanted."""
        batch, number, queries, _ = call.query.shape
        width, (texts, heads, length, own) = call.value.shape[-1], output.shape
        if texts not in (1, batch) or (heads, own) != (number, width):
            raise ValueError(
                f"PatchOutput: {call.place.path} puts out {(batch, number, queries, width)}, (batch, heads, queries, width), "
                f"the captured run {tuple(output.shape)}"
            )
        first = call.place.query_start - kept.start
        if first == 0 and length == queries:
            return output
        index = torch.arange(first, first + queries, device=output.device)
        known = (index >= 0) & (index < length)
        if bool((rows & ~known).any()):
            raise ValueError(
                f"PatchOutput: of {call.place.path} the positions {kept.start} to {kept.start + length - 1} were captured, "
                f"but its queries stand at {call.place.query_start} to {call.place.query_start + queries - 1}; choose "
                "among those captured with queries=, or the pass with passes="
            )
        return output[:, :, index.clamp(0, length - 1)].where(known[:, None], 0.0)


def put(call: AttentionCall, rows: Tensor, output: Tensor) -> AttentionCall:
    """The call that puts out ``output`` (B|1, H, N|1, Dv) in these rows, whatever it would have."""
    gate = torch.ones((), device=call.query.device) if call.gate is None else call.gate
    added = torch.zeros((), device=call.query.device, dtype=output.dtype) if call.added is None else call.added
    return replace(
        call, gate=gate.where(~rows, 0.0), added=torch.where(rows[..., None], output.to(call.query.device), added)
    )
