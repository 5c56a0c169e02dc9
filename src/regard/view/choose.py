"""Find a layer, a head, a batch entry or a name in a dataset, or say which ones there are."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import xarray as xr


def layers(dataset: xr.Dataset) -> list[str]:
    """List the module paths of the layers; their indices where the dataset has no paths.

    Example:
        >>> layers(xr.Dataset(coords={"layer": ["encoder.0", "encoder.1"]}))
        ['encoder.0', 'encoder.1']
    """
    return _labels(dataset, "layer")


def heads(dataset: xr.Dataset) -> list[str]:
    """List the labels of the heads.

    Example:
        >>> heads(xr.Dataset(coords={"head": [1, 5]}))
        ['1', '5']
    """
    return _labels(dataset, "head")


def _labels(dataset: xr.Dataset, axis: str) -> list[str]:
    labels = dataset[axis].values if axis in dataset.coords else range(dataset.sizes.get(axis, 0))
    return [str(label) for label in labels]


def name(given: str, known: Iterable[str], what: str) -> str:
    """Return the name if it is known.

    Raises:
        ValueError: it is not; the message gives the nearest known name and all others.

    Example:
        >>> name("entropi", ["entropy", "sink"], "statistic")
        Traceback (most recent call last):
        ...
        ValueError: no statistic "entropi"; did you mean "entropy"? There are: entropy, sink
    """
    known = list(known)
    if given in known:
        return given
    near = get_close_matches(given, known, n=1, cutoff=0.4)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise ValueError(f'no {what} "{given}"; {hint}There are: {", ".join(known) or "none"}')


def index(given: int, labels: Sequence[str], what: str) -> int:
    """Return a valid index for one given, which may count from the end.

    Raises:
        ValueError: it is out of range.

    Example:
        >>> index(-1, ["a", "b"], "layer")
        1
    """
    if -len(labels) <= given < len(labels):
        return given % len(labels)
    raise ValueError(f"no {what} {given}; there are {len(labels)}, counted from 0")


def layer(dataset: xr.Dataset, given: int | str) -> int:
    """Return the index of a layer given by its index or its module path.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> layer(xr.Dataset(coords={"layer": ["encoder.0", "encoder.1"]}), "encoder.1")
        1
    """
    paths = layers(dataset)
    if isinstance(given, str):
        return paths.index(name(given, paths, "layer"))
    return index(given, paths, "layer")


def head(dataset: xr.Dataset, given: int) -> int:
    """Return the index of a head given by its number.

    Raises:
        ValueError: there is no such head.

    Example:
        >>> head(xr.Dataset(coords={"head": [1, 5]}), 5)
        1
    """
    labels = heads(dataset)
    if str(given) in labels:
        return labels.index(str(given))
    raise ValueError(f"no head {given}; there are: {', '.join(labels) or 'none'}")


def variable(dataset: xr.Dataset, wanted: str, purpose: str) -> xr.DataArray:
    """Return a variable of the dataset.

    Raises:
        ValueError: it was not recorded; the message says what it is needed for and what there is.

    Example:
        >>> variable(xr.Dataset(), "received", "tokens()")
        Traceback (most recent call last):
        ...
        ValueError: tokens() needs the variable received; the dataset holds no variables
    """
    if wanted in dataset:
        return dataset[wanted]
    there = ", ".join(str(name) for name in dataset.data_vars) or "no variables"
    raise ValueError(f"{purpose} needs the variable {wanted}; the dataset holds {there}")
