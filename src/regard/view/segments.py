"""What goes from one named stretch of the tokens to another: from the question to the image, from text to text."""

import numpy as np
import xarray as xr


def between(dataset: xr.Dataset) -> dict[str, xr.DataArray]:
    """The mean share of attention that the queries of each segment give to another one, by "one → other": (layer, head).

    Args:
        dataset: a recording with ``mass``, whose queries have the coordinate ``query_segment`` (batch, query).

    Example:
        >>> mass = np.array([0.3, 0.5]).reshape(1, 1, 1, 2, 1)
        >>> dims = ("layer", "batch", "head", "query", "segment")
        >>> coordinates = {"segment": ["image"], "query_segment": (("batch", "query"), [["text", "text"]])}
        >>> {name: share.item() for name, share in between(xr.Dataset({"mass": (dims, mass)}, coordinates)).items()}
        {'text → image': 0.4}
    """
    if "mass" not in dataset or "query_segment" not in dataset.coords:
        return {}
    of_query = dataset["query_segment"]
    names = [name for name in dict.fromkeys(str(name) for name in of_query.values.ravel()) if name]
    found: dict[str, xr.DataArray] = {}
    for one in names:
        own = dataset["mass"].where(of_query == one)
        for other in dataset["segment"].values:
            if other not in (one, "sink"):
                share = own.sel(segment=other, drop=True).mean(("batch", "query"), dtype=np.float64)
                found[f"{one} → {other}"] = share.drop_vars("query_segment", errors="ignore").transpose("layer", "head")
    return found
