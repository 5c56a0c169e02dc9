"""Steering a model's attention while it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from regard.runtime import AttentionCall, Entry, HiddenCall, Place, Proceed, Reentrant, Site
from regard.steer.edit import Edit
from regard.tokens import Selection, check


class steer(Reentrant["_Entry"]):  # noqa: N801 - a context manager, named as what one writes
    """Edit every chosen attention call of a model, exactly, while it runs as it always does.

    Edits are applied in their order, those of an inner block after those of the blocks around it. They work in ``generate``,
    with padded batches, grouped heads and cross-attention, and with `regard.watch`, which sees the attention matrix that
    the edits of the logits leave. No N×M matrix is made. Everything is restored on exit.

    Args:
        model: an ``nn.Module`` whose attention goes through ``scaled_dot_product_attention``, ``nn.MultiheadAttention``,
            transformers' eager attention, or a softmax of its own that enters a product with values; None for every call
            made in the block.
        edits: such as ``regard.Reweight(keys=[0], by=0.5)``.

    Raises:
        RuntimeError: at the end of a block in which no attention call was seen.
        IndexError, ValueError: at its end, for an edit that matched no call, or positions that no text had.

    Example:
        >>> import torch, regard
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> x = torch.randn(1, 10, 32)
        >>> with torch.no_grad():
        ...     plain = layer(x)
        ...     with regard.steer(layer, regard.Reweight(keys=[0], by=3, heads=[1, 2]), regard.Temperature(0.7)):
        ...         steered = layer(x)
        >>> bool(torch.allclose(plain, steered))
        False
    """

    def __init__(self, model: Module | None, *edits: Edit) -> None:
        super().__init__()
        if model is not None and not isinstance(model, Module):
            raise TypeError(
                f"steer needs an nn.Module, or None for every call in the block; got {type(model).__name__}"
            )
        if not edits:
            raise ValueError("steer has nothing to do: pass edits such as regard.Reweight(keys=[0], by=0.5)")
        for edit in edits:
            if not isinstance(edit, Edit):
                hint = "(…)" if isinstance(edit, type) else ""
                raise TypeError(f"steer takes edits such as regard.Reweight(keys=[0], by=0.5), got {edit!r}{hint}")
        self.model = model
        self.edits = edits

    def __repr__(self) -> str:
        model = [] if self.model is None else [type(self.model).__name__]
        return f"steer({', '.join([*model, *map(repr, self.edits)])})"

    def __enter__(self) -> steer:
        self._enter(_Entry(self.edits), self.model)
        return self


class _Entry(Entry):
    """One entry into a steer: has the model's calls edited."""

    edits = True

    def __init__(self, edits: tuple[Edit, ...]) -> None:
        self._edits = [(edit, Selection(edit.layers, edit.heads, edit.passes)) for edit in edits]
        self._plan: dict[object, list[tuple[Edit, Selection, Tensor]]] = {}
        self._masks: dict[object, Tensor] = {}
        self._queries = self._keys = 0  # as far as the texts seen went

    def check(self) -> None:
        """Refuse a block in which something that was asked for did not happen."""
        super().check()
        seen = {number: path for number, path in self.block.seen.items() if number not in self.block.mixers}
        for edit, selection in self._edits:
            selection.check(seen, len(self.block.seen), self.block.passes)
            for name, where in edit.positions().items():
                check(where, self._queries if name == "queries" else self._keys, f"{edit}: {name}")

    def wants(self, site: Site) -> bool:
        """Whether some edit is of this layer and pass."""
        return any(self.block.chooses(selection, site) for _, selection in self._edits)

    def intercept(self, call: AttentionCall | HiddenCall, proceed: Proceed, alone: bool) -> Tensor:
        """The output of the call as the edits of its layer make it; mixers are left as they are."""
        if isinstance(call, HiddenCall):
            return proceed(call)
        place = call.place
        self._queries = max(self._queries, place.query_start + call.query.shape[2])
        for edit, heads in self._wanted(call):
            call = edit.apply(call, heads)
        self._keys = max(self._keys, place.key_start + call.key.shape[2])
        return proceed(call)

    def _wanted(self, call: AttentionCall) -> list[tuple[Edit, Tensor]]:
        """The edits of this layer, each with its heads; found once, since it is asked at every step of ``generate``."""
        place, number = call.place, call.query.shape[1]
        key = (place.path, number, call.query.device)
        if key not in self._plan:
            self._plan[key] = [
                (edit, selection, self._mask(self._heads(selection, place, number), call))
                for edit, selection in self._edits
                if selection.wants(place.path, place.layer, self.block.layers(selection))
            ]
        return [(edit, heads) for edit, selection, heads in self._plan[key] if selection.wants_pass(place.pass_index)]

    def _heads(self, selection: Selection, place: Place, number: int) -> list[int] | None:
        return selection.heads(place.path, place.layer, number, self.block.layers(selection))

    def _mask(self, heads: list[int] | None, call: AttentionCall) -> Tensor:
        """The chosen heads as booleans, (Hq,), or of length 1 where all are chosen; one tensor for all layers."""
        length, device = 1 if heads is None else call.query.shape[1], call.query.device
        key = (str(heads), length, device)
        if key not in self._masks:
            mask = torch.zeros(length, dtype=torch.bool)
            mask[slice(None) if heads is None else heads] = True
            self._masks[key] = mask.to(device)
        return self._masks[key]
