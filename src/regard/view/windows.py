"""The texts of a recording, one after another."""

import xarray as xr


def windows(dataset: xr.Dataset) -> xr.Dataset:
    """Lay independent passes after one another along the batch, so that every text is an entry of the batch.

    Example:
        >>> import numpy as np
        >>> entropy = np.ones((3, 1, 2, 4, 5))
        >>> dataset = xr.Dataset({"entropy": (("pass", "layer", "batch", "head", "query"), entropy)})
        >>> windows(dataset).sizes["batch"]
        6
    """
    if "pass" not in dataset.dims:
        return dataset
    passes = [dataset.isel({"pass": number}, drop=True) for number in range(dataset.sizes["pass"])]
    return xr.concat(passes, "batch", data_vars="minimal", coords="minimal", compat="override", join="outer")
