"""What a sweep over heads found, layer by head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray


class HeadChange(NamedTuple):
    """What changing one head does: its layer's path, its number, and the metric's mean with the change and less without."""

    layer: str
    head: int
    metric: float
    change: float


@dataclass(frozen=True)
class SweepResult:
    """The metric for each changed head, as `regard.sweep` measured it.

    Args:
        dataset: ``metric`` (layer, head, batch), NaN for heads that a layer has not or that were not swept, and ``plain``
            (batch), that of the model as it is; ``layer`` holds module paths, ``number`` (layer) their numbers in the model.
            Its attributes tell kind and metric.

    >>> import numpy, xarray
    >>> metric = (("layer", "head", "batch"), numpy.array([[[1.0], [3.0]]]))
    >>> coordinates = {"layer": ["encoder.0"], "head": [0, 5]}
    >>> found = SweepResult(xarray.Dataset({"metric": metric, "plain": ("batch", [3.5])}, coordinates))
    >>> found.strongest(1)
    [HeadChange(layer='encoder.0', head=0, metric=1.0, change=-2.5)]
    """

    dataset: xarray.Dataset

    @property
    def plain(self) -> float:
        """The metric of the model as it is, a mean over the texts."""
        return float(self.dataset["plain"].mean())

    @property
    def change(self) -> xarray.DataArray:
        """The metric with each head changed less that without, (layer, head), a mean over the texts."""
        change: xarray.DataArray = (self.dataset["metric"] - self.dataset["plain"]).mean("batch")
        return change.rename("change")

    def strongest(self, number: int = 10) -> list[HeadChange]:
        """The heads whose change moves the metric most, either way, in order."""
        changes = self.change
        found = [
            HeadChange(path, int(head), self.plain + change, change)
            for path, row in zip(self.dataset["layer"].values.tolist(), changes.values.tolist(), strict=True)
            for head, change in zip(self.dataset["head"].values, row, strict=True)
            if change == change  # NaN: the layer has no such head
        ]
        return sorted(found, key=lambda head: -abs(head.change))[:number]

    def heads(self, number: int = 10) -> dict[str, list[int]]:
        """The `strongest` heads by layer, as ``heads=`` of any edit takes them."""
        by_layer: dict[str, list[int]] = {}
        for found in self.strongest(number):
            by_layer.setdefault(found.layer, []).append(found.head)
        return by_layer

    def plot(self) -> go.Figure:
        """Draw the change of every head, layers from top to bottom, as a plotly figure.

        Raises:
            ImportError: plotly is not installed.
        """
        from regard.view.sweep import draw

        return draw(self.change)

    def html(self, model: str = "", text: str = "") -> str:
        """One self-contained HTML page: the picture and the heads in order.

        Args:
            model: the name of the model, for the title.
            text: what it read.

        Raises:
            ImportError: jinja2 or plotly is not installed.
        """
        from regard.view.sweep import report

        return report(self, model, text)

    def save(self, path: str | Path) -> None:
        """Write the dataset to one netCDF file; ``SweepResult(regard.load(path))`` reads it."""
        from regard.watch import save

        save(self.dataset, path)
