"""Some rows and some keys of a map."""

from __future__ import annotations

from torch import Tensor

from regard.maps._composed import Composed
from regard.maps.token_map import TokenMap


class Restricted(Composed):
    """``P[rows, keys]`` of a map P, in this order; ``A.restrict(rows, keys)`` makes it where no cheaper form exists.

    Args:
        part: P, (B, H, N, M).
        rows: positions of queries, or None for all.
        keys: positions of keys, or None for all.
    """

    def __init__(self, part: TokenMap, rows: Tensor | None, keys: Tensor | None) -> None:
        super().__init__(part)
        self.part = part
        self.rows_kept = rows
        self.keys_kept = keys

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, len(rows), len(keys))."""
        batch, heads, queries, keys = self.part.shape
        return (
            batch,
            heads,
            queries if self.rows_kept is None else len(self.rows_kept),
            keys if self.keys_kept is None else len(self.keys_kept),
        )

    def heads(self, index: list[int]) -> TokenMap:
        """Those heads, restricted."""
        return Restricted(self.part.heads(index), self.rows_kept, self.keys_kept)

    def _restricted(self, rows: Tensor | None, keys: Tensor | None) -> TokenMap:
        return Restricted(self.part, _among(self.rows_kept, rows), _among(self.keys_kept, keys))

    @property
    def has_logits(self) -> bool:
        """Where only rows were chosen, of a map that has them."""
        return self.keys_kept is None and self.part.has_logits

    @property
    def _row_totals(self) -> Tensor | None:
        totals = self.part._row_totals
        if totals is None or self.keys_kept is not None or self.rows_kept is None:
            return totals if self.keys_kept is None else None
        return totals if totals.shape[2] == 1 else totals[:, :, self.rows_kept]

    def _product(self, values: Tensor) -> Tensor:
        return _chosen(self.part._product(_placed(values, self.keys_kept, self.part.shape[3])), self.rows_kept)

    def _transposed(self, weights: Tensor) -> Tensor:
        return _chosen(self.part._transposed(_placed(weights, self.rows_kept, self.part.shape[2])), self.keys_kept)

    def _some_rows(self, index: Tensor) -> Tensor:
        rows = self.part._some_rows(index if self.rows_kept is None else self.rows_kept[index])
        return rows if self.keys_kept is None else rows[..., self.keys_kept]

    def _some_columns(self, index: Tensor) -> Tensor:
        columns = self.part._some_columns(index if self.keys_kept is None else self.keys_kept[index])
        return _chosen(columns, self.rows_kept)

    def _expect(self, question: str, *arguments: object) -> None:
        if question == "entropy":
            self.part._expect(question)

    def _entropy(self) -> Tensor:
        return _chosen(self.part.entropy(), self.rows_kept)

    def logsumexp(self) -> Tensor:
        """``L_i = log Σ_j exp s_ij``: (B, H, N), natural logarithm, where the map `has_logits`."""
        return _chosen(self.part.logsumexp(), self.rows_kept) if self.has_logits else super().logsumexp()

    def viewers(self, weights: Tensor | None = None) -> Tensor:
        """The number of queries that may see each key, or the sum of their weights (B|1, 1, N), where it `has_logits`."""
        if not self.has_logits:
            return super().viewers(weights)
        if weights is None:
            weights = self._new(1, 1, self.shape[2]).fill_(1.0)
        return self.part.viewers(_placed(weights[..., None], self.rows_kept, self.part.shape[2]).squeeze(-1))


def _chosen(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Some of the tokens of a (B, H, N, …) tensor."""
    return tensor if index is None else tensor[:, :, index]


def _placed(tensor: Tensor, index: Tensor | None, length: int) -> Tensor:
    """(B, H, length, W), with what is given for some tokens at their places, and 0 elsewhere; what meets is added."""
    if index is None:
        return tensor
    batch, heads, _, width = tensor.shape
    return tensor.new_zeros(batch, heads, length, width).index_add(2, index, tensor)


def _among(kept: Tensor | None, chosen: Tensor | None) -> Tensor | None:
    """Positions in the whole, from positions among those kept."""
    if kept is None or chosen is None:
        return kept if chosen is None else chosen
    return kept[chosen]
