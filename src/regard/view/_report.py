"""One self-contained HTML page about what the heads of a model did on a text."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from regard.inputs import Picture
from regard.view import choose
from regard.view.heads import KINDS, statistics
from regard.view.lengths import lengths
from regard.view.pack import pack
from regard.view.page import render
from regard.view.patches import PATCH_KINDS
from regard.view.segments import between
from regard.view.shares import block_sides, coarsen, shares
from regard.view.statistics import STATISTICS
from regard.view.windows import windows
from regard.view.words import pieces

OVERVIEW = (
    "entropy", "sink", "class_token", "previous", "own", "induction", "retrieval", "mean_distance", "own_patch",
    "neighbour", "surroundings", "grid_distance",
)  # fmt: skip
"""The statistics that are drawn for all heads side by side."""
BUDGET = 1 << 22
"""The text, and the pictures, may take this many numbers each; a number takes 4/3 bytes in the page."""
SIDE = 64
"""A picture has at most this many blocks on a side."""
LEAST_SIDE = 16
"""Windows are left out rather than drawn with fewer blocks than this on a side."""
READABLE = 20_000
"""At most this many tokens of one window are shown: browsers are slow with more."""


@dataclass(frozen=True)
class RunFacts:
    """What is said about the run at the top of a report.

    Args:
        model: the name of the model.
        text: the name of the text.
        tokens: how many tokens were read.
        layers: how many layers were watched.
        heads: how many heads a layer has, at most.
        seconds: how long the run took.
        peak_memory: the most memory in use, in bytes.
        stored_memory: what the attention matrices would have taken if they had been stored, in bytes.
        device: where it ran.
        dtype: in which numbers it ran.
        version: the version of regard.

    Example:
        >>> facts = RunFacts("MiniLM", "a line", 502, 6, 12, 1.2, 3 * 10**8, 7 * 10**7, "cpu", "float32", "1.0")
        >>> facts.tokens
        502
    """

    model: str
    text: str
    tokens: int
    layers: int
    heads: int
    seconds: float
    peak_memory: int
    stored_memory: int
    device: str
    dtype: str
    version: str


@dataclass(frozen=True)
class ShownPart:
    """A recording of one part of a model's attention, such as an encoder's.

    Args:
        name: what it is, such as "Cross-attention".
        dataset: as `regard.watch` makes it.
        picture: the image that its keys are patches of, if they are.

    Example:
        >>> ShownPart("Text", xr.Dataset()).picture is None
        True
    """

    name: str
    dataset: xr.Dataset
    picture: Picture | None = None


def report(recorded: xr.Dataset | Sequence[ShownPart], facts: RunFacts, notes: Sequence[str] = ()) -> str:
    """Write a recording as one HTML page that needs no network.

    The page shows each head's statistics, its kind, what each token of the text receives, and the pooled
    picture of the head. What was not recorded is left out. Numbers about tokens and blocks are kept in one
    byte each, so the page of a thousand heads on two thousand tokens is about 13 MB, of which plotly is 5.
    The text and the pictures of a larger recording are cut to its first windows and tokens, and say so.
    Tokens that are patches of an image stand on it.

    Args:
        recorded: a recording, as `regard.watch` makes them, or one for each part of the model's attention, of which the
            page shows one at a time.
        facts: what to say about the run.
        notes: what one should know of what was read, a line each.

    Returns:
        The text of an HTML file.

    Raises:
        ImportError: jinja2 or plotly is not installed.
        ValueError: nothing in the dataset can be shown.

    Example:
        >>> received = np.ones((1, 1, 1, 3))
        >>> dataset = xr.Dataset({"received": (("layer", "batch", "head", "key"), received)})
        >>> facts = RunFacts("MiniLM", "a line", 3, 1, 1, 0.1, 10**6, 36, "cpu", "float32", "1.0")
        >>> report(dataset, facts).startswith("<!doctype html>")
        True
    """
    parts = [ShownPart("", recorded)] if isinstance(recorded, xr.Dataset) else recorded
    pages = [_page(part) for part in parts]
    page: dict[str, object] = {"parts": pages}
    titles = {one["name"]: one for own in pages for one in own["statistics"]}
    return render(
        "report.html",
        "report.js",
        page,
        statistics=list(titles.values()),
        has={what: any(own[what] is not None for own in pages) for what in ("kinds", "text", "pictures")},
        names=[part.name for part in parts],
        notes=list(notes),
        windows=max(own["windows"] for own in pages),
        facts=facts,
        model=facts.model,
        version=facts.version,
        fact_list=_fact_list(facts, sum(len(own["layers"]) * len(own["heads"]) for own in pages)),
        kinds=KINDS | PATCH_KINDS,
    )


def _page(part: ShownPart) -> dict[str, Any]:
    """Collect what the script of the page needs of one part, as plain values."""
    dataset = windows(part.dataset)
    summary = statistics(dataset)
    if not summary.data_vars and "received" not in dataset and "pooled" not in dataset:
        there = ", ".join(str(name) for name in dataset.data_vars) or "no variables"
        raise ValueError(
            f"nothing to report: the dataset holds {there}; it needs at least one of entropy, mean_distance, "
            "mass, at, received, pooled"
        )
    return {
        "layers": choose.layers(dataset),
        "heads": choose.heads(dataset),
        "windows": dataset.sizes.get("batch", 1),
        "present": _present(dataset).tolist(),
        "statistics": _overview(summary) + _between(dataset),
        "kinds": _kinds(summary),
        "text": _text(dataset, part.picture) if "received" in dataset else None,
        "pictures": _pictures(dataset) if "pooled" in dataset else None,
    }


def _present(dataset: xr.Dataset) -> NDArray[np.bool_]:
    """Tell which heads each layer has: those with any number at all."""
    present = np.zeros((dataset.sizes["layer"], dataset.sizes["head"]), dtype=bool)
    for array in dataset.data_vars.values():
        if {"layer", "head"} <= set(array.dims):
            others = [name for name in array.dims if name not in ("layer", "head")]
            present |= array.notnull().any(others).transpose("layer", "head").values
    return present


def _overview(summary: xr.Dataset) -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "title": STATISTICS[name].title,
            "unit": STATISTICS[name].unit,
            "sentence": STATISTICS[name].sentence,
            "values": _numbers(summary[name].values),
        }
        for name in OVERVIEW
        if name in summary and bool(summary[name].notnull().any())
    ]


def _between(dataset: xr.Dataset) -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "title": name[0].upper() + name[1:],
            "unit": "share of attention",
            "sentence": f"The stronger the colour, the more attention goes from {name.replace(' → ', ' to ')}.",
            "values": _numbers(share.values),
        }
        for name, share in between(dataset).items()
    ]


def _kinds(summary: xr.Dataset) -> dict[str, object] | None:
    if "kind" not in summary:
        return None
    offset = summary["offset"].values if "offset" in summary else np.full(summary["kind"].shape, np.nan)
    return {
        "kind": summary["kind"].values.tolist(),
        "score": _numbers(summary["score"].values),
        "offset": _numbers(offset),
        "direction": summary["direction"].values.tolist() if "direction" in summary else None,
    }


def _text(dataset: xr.Dataset, picture: Picture | None) -> dict[str, object]:
    received = dataset["received"].transpose("batch", "layer", "head", "key")
    count, layers, heads, keys = received.shape
    rows = max(layers * heads, 1)
    keys_shown = min(keys, READABLE, max(BUDGET // rows, 1))
    windows_shown = min(count, max(BUDGET // (rows * keys_shown), 1))
    values = received.values[:windows_shown, :, :, :keys_shown]
    return {
        "windows": [_pieces(dataset, "key", window)[:keys_shown] for window in range(windows_shown)],
        "queries": [_pieces(dataset, "query", window)[:READABLE] for window in range(windows_shown)],
        "segments": [_segments(dataset, window)[:keys_shown] for window in range(windows_shown)],
        "picture": _on_the_page(picture),
        "tokens_left_out": int(lengths(dataset, "key").max()) - keys_shown if keys_shown < keys else 0,
        "received": pack(values.reshape(-1, keys_shown)),
    }


def _pieces(dataset: xr.Dataset, dim: Literal["query", "key"], window: int) -> list[str]:
    return pieces(dataset, window, dim) or [f" {position}" for position in range(dataset.sizes.get(dim, 0))]


def _segments(dataset: xr.Dataset, window: int) -> list[str]:
    """Which named stretch each key is of; nothing where there are none."""
    if "key_segment" not in dataset.coords:
        return []
    return [str(name) for name in dataset["key_segment"].isel(batch=window).values]


def _on_the_page(picture: Picture | None) -> dict[str, object] | None:
    if picture is None:
        return None
    return {
        "source": f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}",
        "rows": picture.height,
        "columns": picture.width,
        "positions": list(picture.positions),
    }


def _pictures(dataset: xr.Dataset) -> dict[str, object]:
    pooled = dataset["pooled"].transpose("batch", "layer", "head", "row", "column")
    count, layers, heads, rows, columns = pooled.shape
    matrices = max(layers * heads, 1)
    fitting = int((BUDGET / (matrices * count)) ** 0.5)
    side = min(SIDE, max(rows, columns), max(fitting, LEAST_SIDE))
    windows_shown = min(count, max(BUDGET // (matrices * side * side), 1))
    merged, factor = coarsen(pooled.isel(batch=slice(windows_shown)), side)
    share = shares(merged).values
    return {
        "windows": windows_shown,
        "blocks": [rows, columns],
        "merged": factor,
        "shown": list(share.shape[-2:]),
        "sides": block_sides(pooled),
        "queries": lengths(dataset, "query").values.tolist(),
        "keys": lengths(dataset, "key").values.tolist(),
        "share": pack(share.reshape(-1, share.shape[-2] * share.shape[-1])),
    }


def _numbers(values: NDArray[np.floating]) -> list[list[float | None]]:
    return [[float(f"{number:.4g}") if np.isfinite(number) else None for number in row] for row in values]


def _fact_list(facts: RunFacts, heads: int) -> list[tuple[str, str, str]]:
    """Name each fact, its value, and a remark on it."""
    ratio = facts.stored_memory / facts.peak_memory if facts.peak_memory else 0
    alike = heads == facts.layers * facts.heads
    return [
        ("Tokens", f"{facts.tokens:,}", ""),
        ("Heads", f"{heads:,}", f"{facts.layers} layers of {facts.heads if alike else f'up to {facts.heads}'}"),
        ("Time", seconds(facts.seconds), f"on {facts.device}, {facts.dtype}"),
        ("Peak memory", _bytes(facts.peak_memory), "for the whole run"),
        ("Stored attention", _bytes(facts.stored_memory), _times(ratio)),
    ]


def _times(ratio: float) -> str:
    remark = "what the matrices would have taken"
    return f"{remark}, {ratio:,.0f} times the peak" if ratio >= 2 else remark


def seconds(seconds: float) -> str:
    """A time as one says it: minutes, seconds or milliseconds.

    >>> seconds(0.25)
    '250 ms'
    """
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
