"""Single pictures of a recording, as plotly figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from regard.view import choose
from regard.view.heads import summarize
from regard.view.lengths import lengths
from regard.view.shares import block_sides, edges, shares
from regard.view.statistics import STATISTICS
from regard.view.windows import windows
from regard.view.words import pieces

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCALE = ("#faf5ea", "#f2d59c", "#e39a49", "#bb582a", "#7a2a2b", "#36121f")
"""A sequential scale of falling lightness, which colour-blind eyes read as well as any."""
FAINTEST = 1e-4
"""Shares below this are drawn like this one, or not at all where they are bars."""


@dataclass(frozen=True)
class Plot:
    """Pictures of a recording; each method returns a plotly figure.

    Args:
        dataset: a recording, as `regard.watch` makes them.

    Raises:
        ImportError: on drawing, when plotly is not installed.

    Example:
        >>> entropy = np.ones((2, 1, 3, 4))
        >>> dataset = xr.Dataset({"entropy": (("layer", "batch", "head", "query"), entropy)})
        >>> figure = Plot(dataset).heads("entropy")
        >>> figure.data[0].z.shape
        (2, 3)
    """

    dataset: xr.Dataset

    @cached_property
    def summary(self) -> xr.Dataset:
        """What `summarize` makes of the dataset."""
        return summarize(self.dataset)

    @cached_property
    def _windows(self) -> xr.Dataset:
        return windows(self.dataset)

    def heads(self, statistic: str = "entropy") -> go.Figure:
        """Draw one statistic of every head, layers from top to bottom.

        Args:
            statistic: the name of any number in the summary, such as "entropy", "sink" or "score".

        Raises:
            ValueError: there is no such statistic.

        Example:
            >>> entropy = np.ones((2, 1, 3, 4))
            >>> dataset = xr.Dataset({"entropy": (("layer", "batch", "head", "query"), entropy)})
            >>> Plot(dataset).heads("broad").layout.title.text
            'Broad'
        """
        graph = graph_objects()
        known = [str(name) for name in self.summary.data_vars if name != "kind"]
        about = STATISTICS[choose.name(statistic, known, "statistic")]
        paths, numbers = choose.layers(self.dataset), choose.heads(self.dataset)
        hover = [[f"layer {n}, head {h}<br>{escape(path)}" for h in numbers] for n, path in enumerate(paths)]
        picture = graph.Heatmap(
            z=self.summary[statistic].values,
            text=hover,
            hovertemplate="%{text}<br>%{z:.3g} " + about.unit + "<extra></extra>",
            colorscale=SCALE,
            colorbar={"title": about.unit},
        )
        figure = figure_of(picture, about.title)
        figure.update_xaxes(title="head", tickvals=[*range(len(numbers))], ticktext=numbers)
        figure.update_yaxes(title="layer", autorange="reversed", tickformat="d")
        return figure

    def tokens(self, layer: int | str | None = None, head: int | None = None, batch: int = 0) -> go.Figure:
        """Draw the attention that each token receives, along the text, on a logarithmic axis.

        1 is all the attention that one query gives, and so the average where there are as many keys as
        queries. Without `layer` or `head` it is the mean over all of them.

        Args:
            layer: an index or a module path.
            head: the number of a head.
            batch: the entry of the batch.

        Raises:
            ValueError: there is no such layer, head or entry, or `received` was not recorded.

        Example:
            >>> received = np.array([2.0, 0.5, 0.5]).reshape(1, 1, 1, 3)
            >>> dataset = xr.Dataset({"received": (("layer", "batch", "head", "key"), received)})
            >>> Plot(dataset).tokens(layer=0, head=0).data[0].y
            array([2. , 0.5, 0.5])
        """
        graph = graph_objects()
        received = choose.variable(self._windows, "received", "tokens()")
        chosen = self._batch(received, batch)
        title = "Attention received"
        if layer is not None:
            chosen = chosen.isel(layer=[choose.layer(self.dataset, layer)])
            title += f", layer {layer}"
        if head is not None:
            chosen = chosen.isel(head=[choose.head(self.dataset, head)])
            title += f", head {head}"
        values = chosen.mean(("layer", "head")).values
        present = np.isfinite(values)
        position = np.arange(len(values))[present]
        token = [escape(piece.strip() or repr(piece), quote=False) for piece in pieces(self._windows, batch)]
        token = [token[at] for at in position] if token else [f"token {at}" for at in position]
        bars = graph.Bar(
            x=position,
            y=values[present],
            text=token,
            textposition="none",
            marker={"color": SCALE[3], "line": {"width": 0}},
            hovertemplate="%{text}<br>position %{x}<br>receives %{y:.3g}<extra></extra>",
        )
        figure = figure_of(bars, escape(title, quote=False))
        figure.update_layout(bargap=0.1)
        most = np.log10(max(values[present].max(initial=1.0), 10 * FAINTEST))
        figure.update_yaxes(
            type="log", range=[np.log10(FAINTEST), most], dtick=1, title="attention received", exponentformat="none"
        )
        figure.update_xaxes(title="position")
        if len(token) <= 60:
            figure.update_xaxes(tickvals=position, ticktext=token, title=None)
        return figure

    def map(self, layer: int | str, head: int, batch: int = 0) -> go.Figure:
        """Draw the pooled attention matrix of one head, on a logarithmic scale of colours.

        Each cell is the share of attention that a block of queries, from top to bottom, gives to a block of
        keys, from left to right; a row of cells sums to 1.

        Args:
            layer: an index or a module path.
            head: the number of a head.
            batch: the entry of the batch.

        Raises:
            ValueError: there is no such layer, head or entry, or `pooled` was not recorded.

        Example:
            >>> pooled = np.array([[4.0, 0.0], [1.0, 3.0]]).reshape(1, 1, 1, 2, 2)
            >>> dataset = xr.Dataset({"pooled": (("layer", "batch", "head", "row", "column"), pooled)})
            >>> Plot(dataset).map(layer=0, head=0).data[0].customdata
            array([[1.  , 0.  ],
                   [0.25, 0.75]])
        """
        graph = graph_objects()
        pooled = choose.variable(self._windows, "pooled", "map()")
        number = choose.layer(self.dataset, layer)
        chosen = self._batch(pooled, batch).isel(layer=number, head=choose.head(self.dataset, head))
        share = shares(chosen).transpose("row", "column").values
        queries, keys = (int(lengths(self._windows, axis)[number, batch]) for axis in ("query", "key"))
        rows, columns = block_sides(pooled)
        ticks = np.arange(np.log10(FAINTEST), 1)
        picture = graph.Heatmap(
            x=edges(share.shape[1], keys or share.shape[1], columns),
            y=edges(share.shape[0], queries or share.shape[0], rows),
            z=np.log10(np.maximum(np.where(share > 0, share, np.nan), FAINTEST)),
            customdata=share,
            hovertemplate="query %{y}<br>key %{x}<br>share %{customdata:.2%}<extra></extra>",
            colorscale=SCALE,
            zmin=ticks[0],
            zmax=0,
            colorbar={"title": "share", "tickvals": ticks, "ticktext": [f"{10**tick:.4g}" for tick in ticks]},
        )
        path = escape(choose.layers(self.dataset)[number], quote=False)
        figure = figure_of(picture, f"{path}, head {head}")
        figure.update_xaxes(title="key", constrain="domain")
        figure.update_yaxes(title="query", autorange="reversed", scaleanchor="x", constrain="domain")
        return figure

    def _batch(self, array: xr.DataArray, given: int) -> xr.DataArray:
        entries = [str(number) for number in range(array.sizes["batch"])]
        return array.isel(batch=choose.index(given, entries, "batch entry"))


def graph_objects() -> ModuleType:
    """What plotly draws with.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ImportError('pictures need plotly: pip install "regard[report]"') from error
    graph: ModuleType = plotly.graph_objects
    return graph


def figure_of(picture: object, title: str) -> go.Figure:
    """A figure of one picture, under its title."""
    layout = {"title": {"text": title}, "template": "plotly_white", "margin": {"t": 56, "r": 16}}
    return graph_objects().Figure(picture, layout)
