"""What each head does: a few means over the text, and the kind of head that they make."""

from collections.abc import Hashable

import numpy as np
import xarray as xr

from regard.view.lengths import lengths
from regard.view.patches import is_of_patches, patch_statistics

NEAR = 8
"""Attention to a token at most this far away is local."""
EVEN = 0.8
"""A head is broad when its entropy is at least this share of the largest possible one."""
ONE_PLACE = 0.3
"""A head is named after one place (a fixed offset, an induction target, the sink) that takes this share."""
LOCAL = 0.5
"""A head is local when this share of its attention stays within `NEAR` tokens."""
SLACK = 0.05
"""Nats by which rounding may lift an entropy above the logarithm of the number of keys."""

_ONE_PLACE_KINDS = {
    "previous-token": "previous",
    "own-token": "own",
    "induction": "induction",
    "retrieval": "retrieval",
    "positional": "positional",
}
_NAMED = ("previous", "own", "induction", "retrieval")
_RULES: tuple[tuple[float, dict[str, str]], ...] = (
    (EVEN, {"broad": "broad"}),
    (ONE_PLACE, _ONE_PLACE_KINDS),
    (LOCAL, {"local": "local"}),
    (ONE_PLACE, {"sink": "sink"}),
)
"""In the order in which they are tried: the share that is needed, and each kind with its statistic."""

KINDS = {
    "broad": f"looks at nearly everything: its entropy is at least {EVEN:.0%} of the largest possible",
    "previous-token": f"gives at least {ONE_PLACE:.0%} of its attention to the token just before",
    "own-token": f"gives at least {ONE_PLACE:.0%} of its attention to the token itself",
    "induction": f"gives at least {ONE_PLACE:.0%} to what followed the same token last time, where it follows again",
    "retrieval": f"gives at least {ONE_PLACE:.0%} to the token that is about to be copied, where induction would mislead",
    "positional": f"gives at least {ONE_PLACE:.0%} of its attention to one other fixed distance",
    "local": f"keeps at least {LOCAL:.0%} of its attention within {NEAR} tokens on either side",
    "sink": f"parks at least {ONE_PLACE:.0%} of its attention on the first token and on special tokens",
    "mixed": "does none of these clearly",
}
"""Each kind of head in words, in the order in which the rule tries them."""


def summarize(dataset: xr.Dataset) -> xr.Dataset:
    """Average the recorded statistics of each head and name the kind of head that they make.

    Every entry has the dimensions (layer, head). All are means over batch and queries that leave NaN out:

    - `entropy` in nats and `mean_distance` in tokens.
    - `sink`, `previous`, `own`, `induction`, `retrieval`: the share of attention that goes there. A query that has no such
      key, such as a token that occurs for the first time, does not count.
    - `local`: the share within 8 tokens on either side. It needs the offsets -8 to 0; those after the query
      count where they were recorded.
    - `positional`: the share of the best single offset other than the previous and the own token, and
      `offset`, which one it is.
    - `broad`: entropy as a share of the logarithm of the number of keys that a query can see, between 0 and
      1. A layer counts as causal if no query's entropy exceeds what the positions up to it allow; there,
      query i sees i + 1 keys. In all other layers a query sees all keys of its text. A narrower mask, such
      as a sliding window, is not known here, so a head under one is broader than this says.

    `kind` is the first of these that holds, and `score` the number that decided:

    1. "broad" if `broad` is at least 0.8. In a long text so even a head cannot hold much in one place; in a
       short one, where everything is near, this keeps an even head from being named local.
    2. "previous-token", "own-token", "induction", "retrieval" or "positional" if that share is at least 0.3, the
       largest of them. They come before the sink since a head rests on the sink where it finds nothing to do.
    3. "local" if `local` is at least 0.5.
    4. "sink" if `sink` is at least 0.3.
    5. "mixed" otherwise; the score is then how near the head comes to any of these, from 0 to 1.

    Of patches that look at patches the entries and kinds are those of `regard.view.patches`.

    A variable that was not recorded only takes its own entries away. Heads that a layer does not have are
    NaN, with the kind "".

    Args:
        dataset: a recording, as `regard.watch` makes them.

    Returns:
        A dataset over (layer, head).

    Raises:
        ValueError: there is nothing in the dataset to summarize.

    Example:
        >>> import numpy as np, xarray as xr
        >>> at = np.array([np.nan, 0.9, 0.7]).reshape(1, 1, 1, 3, 1)
        >>> dims = ("layer", "batch", "head", "query", "target")
        >>> dataset = xr.Dataset({"at": (dims, at)}, coords={"target": ["previous"]})
        >>> summary = summarize(dataset)
        >>> summary["kind"].item(), summary["score"].item()
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
    if "entropy" in dataset:
        found["entropy"] = _mean(dataset["entropy"])
        found["broad"] = _broad(dataset)
    if "mass" in dataset and "sink" in dataset["segment"].values:
        found["sink"] = _mean(dataset["mass"].sel(segment="sink"))
    if "at" in dataset and "target" in dataset["at"].coords:
        found |= _targets(dataset["at"])
    if "mean_distance" in dataset:
        found["mean_distance"] = _mean(dataset["mean_distance"])
    found = {name: array.transpose("layer", "head") for name, array in found.items()}
    return xr.Dataset(found | _kinds(found))


def _mean(array: xr.DataArray) -> xr.DataArray:
    over = [name for name in array.dims if name not in ("layer", "head")]
    return array.mean(over, dtype=np.float64).drop_vars(("target", "segment"), errors="ignore")


def _broad(dataset: xr.Dataset) -> xr.DataArray:
    entropy = dataset["entropy"]
    upto = dataset["query"] + 1 if "query" in dataset.coords else _positions(entropy) + 1
    others: list[Hashable] = [name for name in entropy.dims if name != "layer"]
    causal = (entropy.isnull() | (entropy <= np.log(upto) + SLACK)).all(others)
    visible = upto.where(causal, lengths(dataset, "key"))
    share = entropy / np.log(visible.where(visible > 1))
    return _mean(share.clip(max=1))


def _positions(entropy: xr.DataArray) -> xr.DataArray:
    return xr.DataArray(np.arange(entropy.sizes["query"]), dims="query")


def _offset(target: str) -> int | None:
    """Read a target as a distance in tokens; None for one that is not a fixed distance."""
    named = {"previous": -1, "own": 0, "next": 1}
    if target in named:
        return named[target]
    return int(target) if target.removeprefix("-").removeprefix("+").isdecimal() else None


def _targets(at: xr.DataArray) -> dict[str, xr.DataArray]:
    names = [str(name) for name in at["target"].values]
    # One target at a time: the whole array may be large, and a mean that skips NaN copies what it is given.
    means = {name: _mean(at.sel(target=name)) for name in names}
    found: dict[str, xr.DataArray] = {name: means[name] for name in _NAMED if name in means}
    offsets = {name: offset for name in names if (offset := _offset(name)) is not None}
    if set(range(-NEAR, 1)) <= set(offsets.values()):
        found["local"] = _local(at, [name for name, offset in offsets.items() if abs(offset) <= NEAR])
    others = {offset: means[name] for name, offset in offsets.items() if offset not in (-1, 0)}
    if others:
        arrays: list[xr.DataArray] = list(others.values())
        stacked = xr.concat(arrays, xr.DataArray(list(others), dims="offset", name="offset"))
        found["positional"] = stacked.max("offset")
        found["offset"] = stacked.idxmax("offset")
    return found


def _local(at: xr.DataArray, near: list[str]) -> xr.DataArray:
    total = xr.zeros_like(at.isel(target=0, drop=True))
    known = xr.zeros_like(total, dtype=bool)
    for name in near:
        share = at.sel(target=name, drop=True)
        total += share.fillna(0)
        known |= share.notnull()
    return _mean(total.where(known))


def _kinds(found: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    used = [found[name] for _, kinds in _RULES for name in kinds.values() if name in found]
    if not used:
        return {}
    like = xr.broadcast(*used)[0]
    undecided = np.any([array.notnull() for array in used], axis=0)
    kind = np.where(undecided, "mixed", "").astype("U14")
    score = np.where(undecided, 0.0, np.nan)
    for needed, kinds in _RULES:
        candidates = {name: found[source].values for name, source in kinds.items() if source in found}
        if not candidates:
            continue
        shares = np.nan_to_num(np.stack(list(candidates.values())))
        best = shares.max(0)
        holds = undecided & (best >= needed)
        kind[holds] = np.array(list(candidates))[shares.argmax(0)][holds]
        score[holds] = best[holds]
        undecided &= ~holds
        score[undecided] = np.maximum(score, best / needed)[undecided]
    return {"kind": like.copy(data=kind), "score": like.copy(data=score)}
