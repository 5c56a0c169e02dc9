"""Pictures of a sweep over heads: the change of a metric by layer and head, and the page about it."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from regard.view import choose
from regard.view._report import seconds
from regard.view.page import render
from regard.view.plot import figure_of, graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from regard.steer import SweepResult

SCALE = ("#6b2d14", "#c97436", "#f3efe6", "#5c97c4", "#173f66")
"""From falling to rising, palest in between; blue and brown differ for colour-blind eyes too."""
LISTED = 30

WHAT = {
    "zero": "is set to 0",
    "gate": "is scaled",
    "mean": "is set to its mean",
    "resample": "has its output of another text",
    "patch": "has its output of another run",
}
"""What is done to a head, by the kind of sweep."""


def draw(change: xr.DataArray) -> go.Figure:
    """Draw the change of a metric for every head, layers from top to bottom; palest where there is none.

    Args:
        change: (layer, head), NaN for heads that a layer has not.

    Raises:
        ImportError: plotly is not installed.

    Example:
        >>> change = xr.DataArray([[0.5, -2.0]], dims=("layer", "head"), name="change")
        >>> draw(change).data[0].zmin
        -2.0
    """
    graph = graph_objects()
    dataset = change.to_dataset(name="change")
    paths, heads = choose.layers(dataset), choose.heads(dataset)
    most = float(np.nanmax(np.abs(change.values))) or 1.0
    picture = graph.Heatmap(
        z=change.astype(object).where(change.notnull(), None).values,
        text=[[f"{escape(path)}, head {head}" for head in heads] for path in paths],
        hovertemplate="%{text}<br>%{z:+.3g}<extra></extra>",
        colorscale=[[step / (len(SCALE) - 1), colour] for step, colour in enumerate(SCALE)],
        zmin=-most,
        zmax=most,
        xgap=1,
        ygap=1,
        colorbar={"title": "change"},
    )
    figure = figure_of(picture, "Change of the metric, by head")
    figure.update_xaxes(title="head", tickvals=[*range(len(heads))], ticktext=heads, showgrid=False)
    numbers = [str(number) for number in change["number"].values] if "number" in change.coords else [*range(len(paths))]
    figure.update_yaxes(
        title="layer", autorange="reversed", showgrid=False, tickvals=[*range(len(paths))], ticktext=numbers
    )
    return figure


def report(found: SweepResult, model: str, text: str) -> str:
    """One self-contained HTML page about a sweep: what was measured, the picture, and the strongest heads.

    Args:
        found: the sweep.
        model: the name of the model.
        text: what it read; left out where it is empty.

    Raises:
        ImportError: jinja2 or plotly is not installed.
    """
    import regard

    dataset = found.dataset
    facts = dataset.attrs
    figure = found.plot()
    figure.update_layout(title=None, height=110 + 26 * max(dataset.sizes["layer"], 4), margin={"t": 8, "l": 56})
    by = f" by {facts['by']:g}" if "by" in facts else ""
    swept = int(found.change.notnull().sum())
    facts_shown = [
        ("Metric", f"{found.plain:.4g}", "of the model as it is"),
        ("Heads", f"{swept:,}", f"in {dataset.sizes['layer']} layers"),
        ("Texts", f"{dataset.sizes['batch']:,}", ""),
    ]
    if "seconds" in facts:
        facts_shown.append(("Time", seconds(float(facts["seconds"])), ""))
    rows = [(head.layer, head.head, f"{head.metric:.4g}", f"{head.change:+.4g}") for head in found.strongest(LISTED)]
    return render(
        "sweep.html",
        "sweep.js",
        json.loads(figure.to_json()),
        model=model or "A model",
        version=regard.__version__,
        fact_list=facts_shown,
        text=text,
        metric=f"the {facts.get('metric', 'metric')}",
        what=WHAT.get(str(facts.get("kind")), "is changed") + by,
        plain=f"{found.plain:.4g}",
        strongest=rows,
    )
