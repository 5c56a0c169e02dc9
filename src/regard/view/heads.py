"""What each head does: a few means over the text, and the kind of head that they make."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from regard.view.lengths import lengths
from regard.view.patches import is_of_patches, patch_statistics

NEAR = 8
"""Attention to a token at most this far away is local."""
EVEN = 0.8
"""A head is broad when its entropy is at least this share of the largest possible one."""
LEAST = 0.05
"""A head is named after a place that gets this share of its attention beyond chance, and more."""
ALPHA = 0.01
"""The chance that any head of the model is named after a place that it gives no more than chance."""
BLOCKS = 32
"""Parts of a text whose means are taken as independent: neighbouring queries are not."""
SLACK = 0.05
"""Nats by which rounding may lift an entropy above the logarithm of the number of keys."""

_PLACES = {"previous": "previous-token", "own": "own-token", "induction": "induction", "retrieval": "retrieval"}

KINDS = {
    "previous-token": "gives the token just before more than its other neighbours",
    "own-token": "gives the token itself more than its neighbours",
    "induction": "gives what followed the same token last time more than other tokens as far away",
    "retrieval": "gives the token about to be copied, where induction would mislead, more than others as far away",
    "positional": "gives one other fixed distance more than its neighbours",
    "local": f"keeps its attention within {NEAR} tokens on either side, and at no single distance",
    "sink": "parks its attention on the first token and on special tokens",
    "broad": f"does none of these beyond chance, with at least {EVEN:.0%} of the largest possible entropy",
    "mixed": "does none of these beyond chance: it looks for something else",
}
"""Each kind of head in words."""


def summarize(dataset: xr.Dataset) -> xr.Dataset:
    """Average the recorded statistics of each head and name the kind of head that they make.

    Every entry has the dimensions (layer, head). All are means over batch and queries that leave NaN out:

    - `entropy` in nats and `mean_distance` in tokens.
    - `sink`, `previous`, `own`, `induction`, `retrieval`: the share of attention that goes there. A query that has no such
      key, such as a token that occurs for the first time, does not count. Induction is that of `regard.At`: the token after
      the last earlier occurrence of the query's own token.
    - `local`: the share within 8 tokens on either side. It needs the offsets -8 to 0; those after the query
      count where they were recorded.
    - `positional`: the share of the best single offset other than the previous and the own token, and
      `offset`, which one it is.
    - `broad`: entropy as a share of the logarithm of the number of keys that a query can see, between 0 and
      1. A layer counts as causal if no query's entropy exceeds what the positions up to it allow; there,
      query i sees i + 1 keys. In all other layers a query sees all keys of its text. A narrower mask, such
      as a sliding window, is not known here, so a head under one is broader than this says.

    A head is named after the place to which it gives most *beyond chance*: `score` is the share that goes there less the one
    that would by chance, so that scores of different kinds are shares of attention and compare. Chance is, for the same
    head and the same queries,

    - of an offset ("previous-token", "own-token", "positional"): the mean share of the other offsets within 8 tokens that
      the query sees, so that a head that is merely local is not one of these;
    - of "induction" and "retrieval": the share of other tokens at the same distances, those of the recorded targets
      "induction by chance" and "retrieval by chance"; without them, an even share;
    - of "local", which is `local` less the best single offset: what an even head gives to as many tokens;
    - of "sink": what an even head gives to one token.

    It is named so if the score is at least 0.05 and significantly above 0: by a one-sided t-test over the means of 32
    consecutive parts of the queries that have such a key (neighbouring queries are not independent), at 0.01 divided by the
    number of heads times the number of places that were tried (Bonferroni), so that in at most one of a hundred models any
    head is named by chance. Otherwise it is "broad" if `broad` is at least 0.8, else "mixed"; the score is then `broad`,
    or 0. `beside` is the kind of the largest significant score but for "sink": what a head does where it does not rest.

    Of patches that look at patches the entries and kinds are those of `regard.view.patches`.

    A variable that was not recorded only takes its own entries away. Heads that a layer does not have are
    NaN, with the kind "".

    Previous-token and induction heads: C. Olsson et al. (2022), In-context Learning and Induction Heads. Sinks: G. Xiao
    et al. (2024), Efficient Streaming Language Models with Attention Sinks. Retrieval heads: W. Wu et al. (2024), Retrieval
    Head Mechanistically Explains Long-Context Factuality. Heads at fixed distances: E. Voita et al. (2019), Analyzing
    Multi-Head Self-Attention. Local and broad heads: K. Clark et al. (2019), What Does BERT Look At?

    Args:
        dataset: a recording, as `regard.watch` makes them.

    Returns:
        A dataset over (layer, head).

    Raises:
        ValueError: there is nothing in the dataset to summarize.

    Example:
        >>> import numpy as np, xarray as xr
        >>> at = np.array([np.nan, 0.9, 0.7, 0.8, 0.8]).reshape(1, 1, 1, 5, 1)
        >>> dims = ("layer", "batch", "head", "query", "target")
        >>> dataset = xr.Dataset({"at": (dims, at)}, coords={"target": ["previous"]})
        >>> summary = summarize(dataset)
        >>> summary["kind"].item(), round(summary["previous"].item(), 2)
        ('previous-token', 0.8)
    """
    summary = statistics(dataset)
    if not summary.data_vars:
        there = ", ".join(str(name) for name in dataset.data_vars) or "no variables"
        raise ValueError(
            f"nothing to summarize: the dataset holds {there}; it needs at least one of "
            'entropy, mean_distance, mass with the segment "sink", or at with the target "previous", "own", '
            '"induction", "retrieval" or an offset such as "+2"'
        )
    return summary


def statistics(dataset: xr.Dataset) -> xr.Dataset:
    """Compute what `summarize` returns; empty where there is nothing to summarize.

    Example:
        >>> import xarray as xr
        >>> len(statistics(xr.Dataset()))
        0
    """
    if is_of_patches(dataset):
        return patch_statistics(dataset)
    found: dict[str, xr.DataArray] = {}
    places: dict[str, _Place] = {}
    if "entropy" in dataset:
        found["entropy"] = _mean(dataset["entropy"])
        found["broad"] = _broad(dataset)
    if "mass" in dataset and "sink" in dataset["segment"].values:
        sink = dataset["mass"].sel(segment="sink")
        found["sink"] = _mean(sink)
        places["sink"] = _place(sink, 1 / _visible(dataset, sink))
    if "at" in dataset and "target" in dataset["at"].coords:
        targets, tried = _targets(dataset)
        found |= targets
        places |= tried
    if "mean_distance" in dataset:
        found["mean_distance"] = _mean(dataset["mean_distance"])
    found = {name: array.transpose("layer", "head") for name, array in found.items()}
    return xr.Dataset(found | _kinds(found, places))


@dataclass(frozen=True)
class _Place:
    """For each (layer, head) the share beyond chance that goes to a place, and how likely so much is by chance."""

    excess: NDArray[np.float64]
    likelihood: NDArray[np.float64]


def _mean(array: xr.DataArray) -> xr.DataArray:
    over = [name for name in array.dims if name not in ("layer", "head")]
    return array.mean(over, dtype=np.float64).drop_vars(("target", "segment"), errors="ignore")


def _broad(dataset: xr.Dataset) -> xr.DataArray:
    entropy = dataset["entropy"]
    visible = _visible(dataset, entropy)
    return _mean((entropy / np.log(visible.where(visible > 1))).clip(max=1))


def _visible(dataset: xr.Dataset, like: xr.DataArray) -> xr.DataArray:
    """How many keys each query sees."""
    upto = dataset["query"] + 1 if "query" in dataset.coords else _positions(like) + 1
    return upto.where(_causal(dataset), lengths(dataset, "key"))


def _causal(dataset: xr.Dataset) -> xr.DataArray:
    """Which layers let no query look at a later key, as far as can be told."""
    if "entropy" not in dataset:
        return xr.DataArray(False)
    entropy = dataset["entropy"]
    upto = dataset["query"] + 1 if "query" in dataset.coords else _positions(entropy) + 1
    others: list[Hashable] = [name for name in entropy.dims if name != "layer"]
    return (entropy.isnull() | (entropy <= np.log(upto) + SLACK)).all(others)


def _positions(array: xr.DataArray) -> xr.DataArray:
    return xr.DataArray(np.arange(array.sizes["query"]), dims="query")


def _offset(target: str) -> int | None:
    """Read a target as a distance in tokens; None for one that is not a fixed distance."""
    named = {"previous": -1, "own": 0, "next": 1}
    if target in named:
        return named[target]
    return int(target) if target.removeprefix("-").removeprefix("+").isdecimal() else None


def _targets(dataset: xr.Dataset) -> tuple[dict[str, xr.DataArray], dict[str, _Place]]:
    at = dataset["at"]
    names = [str(name) for name in at["target"].values]
    # One target at a time: the whole array may be large, and a mean that skips NaN copies what it is given.
    means = {name: _mean(at.sel(target=name)) for name in names}
    found: dict[str, xr.DataArray] = {name: means[name] for name in _PLACES if name in means}
    even = 1 / _visible(dataset, at)
    places: dict[str, _Place] = {}
    for name in ("induction", "retrieval"):
        if name in means:
            chance = at.sel(target=f"{name} by chance", drop=True) if f"{name} by chance" in means else even
            places[_PLACES[name]] = _place(at.sel(target=name, drop=True), chance)
    offsets = {name: offset for name in names if (offset := _offset(name)) is not None}
    near = {name: offset for name, offset in offsets.items() if abs(offset) <= NEAR}
    total, number = _near(at, near, _causal(dataset))
    by_offset = {
        offset: _place(share, ((total - share) / (number - 1)).where(number > 1, even) if name in near else even)
        for name, offset in offsets.items()
        for share in [at.sel(target=name, drop=True)]
    }
    places |= {
        _PLACES[name]: by_offset[offset] for name, offset in (("previous", -1), ("own", 0)) if offset in by_offset
    }
    others = {offset: means[name] for name, offset in offsets.items() if offset not in (-1, 0)}
    if others:
        arrays: list[xr.DataArray] = list(others.values())
        stacked = xr.concat(arrays, xr.DataArray(list(others), dims="offset", name="offset"))
        found["positional"] = stacked.max("offset")
        found["offset"] = stacked.idxmax("offset")
        places |= {f"positional {offset:+d}": by_offset[offset] for offset in others}
    if set(range(-NEAR, 1)) <= set(offsets.values()):
        found["local"] = _mean(total.where(number > 0))
        best = xr.concat([means[name] for name in near], "offset").max("offset")
        places["local"] = _place(total.where(number > 0) - best, (number - 1).clip(min=0) * even)
    return found, places


def _near(at: xr.DataArray, near: dict[str, int], causal: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The share that stays near, and to how many tokens it goes, (layer, batch, head, query)."""
    total = xr.zeros_like(at.isel(target=0, drop=True))
    number = xr.zeros_like(total)
    for name, offset in near.items():
        share = at.sel(target=name, drop=True)
        total += share.fillna(0)
        number += share.notnull() & (~causal if offset > 0 else True)
    return total, number


def _place(share: xr.DataArray, chance: xr.DataArray) -> _Place:
    """Test whether a place gets more than chance, by the means of consecutive parts of each text."""
    dims = ("layer", "head", "batch", "query")
    share, chance = (array.transpose(*dims) for array in xr.broadcast(share, chance))
    beyond = (share - chance).values.astype(np.float64)
    beyond = beyond.reshape(*beyond.shape[:2], -1)
    beyond = beyond[..., ~np.isnan(beyond).all((0, 1))]  # the queries that have such a key
    known, number = ~np.isnan(beyond), beyond.shape[-1]
    if not number:
        return _Place(np.full(beyond.shape[:2], np.nan), np.ones(beyond.shape[:2]))
    starts = np.unique(np.arange(BLOCKS) * number // BLOCKS)
    sums = np.add.reduceat(np.where(known, beyond, 0), starts, axis=-1)
    counts = np.add.reduceat(known.astype(np.int64), starts, axis=-1)
    total = counts.sum(-1)
    excess = np.where(total > 0, sums.sum(-1) / np.maximum(total, 1), np.nan)
    parts = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    filled = (counts > 0).sum(-1)
    mean = np.nansum(parts, -1) / np.maximum(filled, 1)
    squares = np.nansum((parts - mean[..., None]) ** 2, -1)
    error = np.sqrt(squares / np.maximum(filled - 1, 1) / np.maximum(filled, 1))
    t = np.divide(mean, error, out=np.where(mean > 0, np.inf, 0.0), where=error > 1e-12)
    return _Place(excess, np.where(filled > 1, _tail(t, filled - 1), 1.0))


def _tail(t: NDArray[np.float64], freedom: NDArray[np.int64]) -> NDArray[np.float64]:
    """The chance of a larger t, by D. L. Wallace (1959), Bounds on Normal Approximations to Student's and the Chi-square."""
    degrees = np.maximum(freedom, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        z = (8 * degrees + 1) / (8 * degrees + 3) * np.sqrt(degrees * np.log1p(t**2 / degrees))
    upper = np.vectorize(lambda value: 0.5 * math.erfc(value / math.sqrt(2)), otypes=[float])(
        np.where(np.isinf(t), 40, z)
    )
    tail: NDArray[np.float64] = np.where(t > 0, upper, 1 - upper)
    return tail


def _kinds(found: dict[str, xr.DataArray], places: dict[str, _Place]) -> dict[str, xr.DataArray]:
    used = [found[name] for name in ("broad", "sink", *_PLACES, "local", "positional") if name in found]
    if not used:
        return {}
    like = xr.broadcast(*used)[0]
    there = np.any([array.notnull() for array in used], axis=0)
    broad = np.nan_to_num(found["broad"].values) if "broad" in found else np.zeros(like.shape)
    kind = np.where(there, np.where(broad >= EVEN, "broad", "mixed"), "").astype("U14")
    score = np.where(there, np.where(broad >= EVEN, broad, 0.0), np.nan)
    beside = np.full(like.shape, "", dtype="U14")
    if places:
        threshold = ALPHA / (max(int(there.sum()), 1) * len(places))
        beyond = np.stack([
            np.where((place.likelihood < threshold) & (place.excess >= LEAST), place.excess, 0.0)
            for place in places.values()
        ])  # fmt: skip
        names = np.array([name.partition(" ")[0] for name in places])
        best = beyond.max(0)
        kind = np.where(best > 0, names[beyond.argmax(0)], kind)
        score = np.where(best > 0, best, score)
        awake = np.where((names == "sink")[:, None, None], 0.0, beyond)
        beside = np.where(awake.max(0) > 0, names[awake.argmax(0)], beside)
    return {"kind": like.copy(data=kind), "score": like.copy(data=score), "beside": like.copy(data=beside)}
