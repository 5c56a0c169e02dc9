"""Recordings made from dense attention matrices, small enough to check by hand."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

OFFSETS = {"previous": -1, "own": 0, "next": 1} | {f"{offset:+d}": offset for offset in (*range(-8, -1), *range(2, 9))}
Recording = Callable[..., xr.Dataset]


def record(attention: NDArray[np.float64], tokens: Sequence[str] = (), blocks: int = 4) -> xr.Dataset:
    """Record attention of shape (layer, batch, head, query, key); the first token is the sink."""
    size = attention.shape[-1]
    index = np.arange(size)
    at = np.full((*attention.shape[:-1], len(OFFSETS)), np.nan)
    for number, offset in enumerate(OFFSETS.values()):
        queries = index[(index + offset >= 0) & (index + offset < size)]
        at[..., queries, number] = attention[..., queries, queries + offset]
    starts = np.arange(blocks) * size // blocks
    pooled = np.add.reduceat(np.add.reduceat(attention, starts, axis=-2), starts, axis=-1)
    logarithm = np.log(np.where(attention > 0, attention, 1))
    dims = ("layer", "batch", "head")
    variables = {
        "entropy": ((*dims, "query"), -(attention * logarithm).sum(-1)),
        "mean_distance": ((*dims, "query"), (attention * np.abs(index[:, None] - index)).sum(-1)),
        "received": ((*dims, "key"), attention.sum(-2)),
        "mass": ((*dims, "query", "segment"), np.stack([attention[..., 0], 1 - attention[..., 0]], -1)),
        "at": ((*dims, "query", "target"), at),
        "pooled": ((*dims, "row", "column"), pooled),
    }
    coordinates = {
        "layer": [f"encoder.{number}.attention" for number in range(len(attention))],
        "head": range(attention.shape[2]),
        "query": range(size),
        "key": range(size),
        "target": list(OFFSETS),
        "segment": ["sink", "rest"],
    }
    dataset = xr.Dataset(variables, coordinates)
    if tokens:
        dataset = dataset.assign_coords(key_token=(("batch", "key"), [list(tokens)] * attention.shape[1]))
    return dataset


@pytest.fixture
def recording() -> Recording:
    """Return the function that records dense attention."""
    return record


@pytest.fixture
def small() -> xr.Dataset:
    """Return 2 layers, 2 windows, 3 heads and 12 tokens; the second layer lacks the last head."""
    generator = np.random.default_rng(0)
    attention = np.exp(2 * generator.normal(size=(2, 2, 3, 12, 12)))
    attention /= attention.sum(-1, keepdims=True)
    dataset = record(attention, ["the", "par", "##rot", ",", "which", "hung", "in", "a", "ca", "##ge", ".", ""])
    there = xr.DataArray([[True, True, True], [True, True, False]], dims=("layer", "head"))
    return dataset.where(there)
