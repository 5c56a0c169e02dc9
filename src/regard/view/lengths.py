"""How many queries and keys each layer really had, where a dataset is padded to the longest."""

from typing import Literal

import xarray as xr


def lengths(dataset: xr.Dataset, axis: Literal["query", "key"]) -> xr.DataArray:
    """Count the positions along an axis that hold a value, for each layer and batch entry.

    Args:
        dataset: a recording, with NaN where it is padded.
        axis: "query" or "key".

    Returns:
        Counts of shape (layer, batch). Where nothing was recorded along the axis, the size of the axis, or
        of the other axis where even that is not there.

    Example:
        >>> import numpy as np, xarray as xr
        >>> received = np.array([1.0, 1.0, np.nan]).reshape(1, 1, 1, 3)
        >>> dataset = xr.Dataset({"received": (("layer", "batch", "head", "key"), received)})
        >>> lengths(dataset, "key").values
        array([[2]])
    """
    recorded = [array for array in dataset.data_vars.values() if {axis, "layer", "batch"} <= set(array.dims)]
    if recorded:
        # A variable may have been recorded in some layers alone, so the longest one counts.
        counts = xr.concat([_count(array, axis) for array in recorded], "variable")
        return counts.max("variable")
    size = dataset.sizes.get(axis) or dataset.sizes.get("query") or dataset.sizes.get("key") or 0
    shape = {name: dataset.sizes.get(name, 1) for name in ("layer", "batch")}
    return xr.DataArray(size).expand_dims(shape)


def _count(array: xr.DataArray, axis: str) -> xr.DataArray:
    others = [name for name in array.dims if name not in ("layer", "batch", axis)]
    return array.notnull().any(others).sum(axis).transpose("layer", "batch")
