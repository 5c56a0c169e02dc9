"""The pooled matrix as a picture: the mean share of attention from a block of queries to a block of keys."""

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def shares(pooled: xr.DataArray) -> xr.DataArray:
    """Divide each row of blocks by its sum, which is the number of its queries that saw any key.

    Rows of queries that saw nothing become NaN.

    Example:
        >>> pooled = xr.DataArray([[6.0, 2.0], [0.0, 0.0]], dims=("row", "column"))
        >>> shares(pooled).values
        array([[0.75, 0.25],
               [ nan,  nan]])
    """
    totals = pooled.sum("column")
    return pooled / totals.where(totals > 0)


def block_sides(pooled: xr.DataArray) -> tuple[int | None, int | None]:
    """Return how many queries and how many keys a block has, where all blocks but the last have the same.

    Those are the attributes "size" and "columns", or both what the sums of the rows tell: a row of blocks sums to the number
    of its queries. None if the text was cut into a given number of nearly equal blocks, of which the first is a smaller one.

    Example:
        >>> block_sides(xr.DataArray([[3.0, 1.0], [1.0, 1.0]], dims=("row", "column")))
        (4, 4)
    """
    if "size" in pooled.attrs:
        size = int(pooled.attrs["size"])
        return size, int(pooled.attrs.get("columns", size))
    totals = pooled.sum("column")
    largest = round(float(totals.max()))
    side = largest if largest and largest == round(float(totals.isel(row=0).max())) else None
    return side, side


def edges(blocks: int, size: int, side: int | None = None) -> NDArray[np.int64]:
    """Return where each block of a text begins, and where the last one ends.

    Args:
        blocks: how many there are.
        size: how many tokens the text has.
        side: how many tokens a block has; None if all blocks are nearly equal.

    Example:
        >>> edges(3, 10), edges(3, 10, side=4)
        (array([ 0,  3,  6, 10]), array([ 0,  4,  8, 10]))
    """
    starts = np.arange(blocks + 1)
    return np.minimum(starts * side, size) if side else starts * size // max(blocks, 1)


def coarsen(pooled: xr.DataArray, most: int) -> tuple[xr.DataArray, int]:
    """Merge squares of blocks until there are at most `most` rows and columns; say how many on a side were merged.

    Example:
        >>> merged, factor = coarsen(xr.DataArray(np.ones((5, 5)), dims=("row", "column")), 3)
        >>> merged.values, factor
        (array([[4., 4., 2.],
               [4., 4., 2.],
               [2., 2., 1.]]), 2)
    """
    factor = -(-max(pooled.sizes["row"], pooled.sizes["column"]) // most)
    if factor <= 1:
        return pooled, 1
    pooled = pooled.transpose(..., "row", "column")
    total = _block_sums(np.nan_to_num(pooled.values), factor)
    known = _block_sums(pooled.notnull().values.astype(np.int64), factor)
    return xr.DataArray(np.where(known > 0, total, np.nan), dims=pooled.dims), factor


def _block_sums(values: NDArray[Any], factor: int) -> NDArray[Any]:
    rows, columns = (np.arange(0, size, factor) for size in values.shape[-2:])
    return np.add.reduceat(np.add.reduceat(values, rows, axis=-2), columns, axis=-1)
