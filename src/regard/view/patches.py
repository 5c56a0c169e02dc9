"""What each head of an encoder of images does: a few means over the patches, and the kind of head that they make."""

import numpy as np
import xarray as xr

from regard.view.lengths import lengths

EVEN = 0.8
"""A head is broad when its entropy is at least this share of the largest possible one."""
ONE_PLACE = 0.3
"""A head is named after one patch, or after class token and registers, that take this share."""
AROUND = 0.5
"""A head is named after a patch's surroundings when this share stays within one patch of it."""

PATCH_KINDS = {
    "own-patch": f"gives at least {ONE_PLACE:.0%} of its attention to the patch itself",
    "neighbour": f"gives at least {ONE_PLACE:.0%} of its attention to one of the eight patches beside it, always the same",
    "surroundings": f"keeps at least {AROUND:.0%} of its attention on the patch and the eight around it",
    "class-token": f"parks at least {ONE_PLACE:.0%} of its attention on the class token and registers",
}
"""Each kind of head that looks from patch to patch in words, beside "broad" and "mixed", in the order of the rule."""


def is_of_patches(dataset: xr.Dataset) -> bool:
    """Whether a recording is of patches that look at patches."""
    return "grid_distance" in dataset


def patch_statistics(dataset: xr.Dataset) -> xr.Dataset:
    """Means over the patches for each head: (layer, head), and its ``kind`` with the ``score`` that decided.

    - `entropy` in nats; `grid_distance` in patches.
    - `class_token`: the share that goes to class token and registers, where there are some.
    - `own_patch`: the share of the patch itself; `neighbour`, that of the best single one of those around it, and
      `direction`, which one it is; `surroundings`: of all nine together.

    A query without the patch in question, as at the border, does not count for it. `kind` is the first that holds: "broad",
    where the entropy is 80% of the largest possible; "own-patch" or "neighbour" from 30%, the larger of them;
    "surroundings" from 50%; "class-token" from 30%; "mixed" otherwise, with how near the head comes to any of these.

    Example:
        >>> at = xr.DataArray(np.full((1, 1, 1, 4, 2), 0.4), dims=("layer", "batch", "head", "query", "target"))
        >>> at = at.assign_coords(target=["own patch", "left"])
        >>> patch_statistics(xr.Dataset({"at": at, "grid_distance": at[..., 0]}))["kind"].item()
        'own-patch'
    """
    found = {"grid_distance": _mean(dataset["grid_distance"])}
    scores: list[tuple[float, dict[str, xr.DataArray]]] = []
    if "entropy" in dataset:
        found["entropy"] = _mean(dataset["entropy"])
        keys = lengths(dataset, "key")
        largest = keys.copy(data=np.log(keys.values))
        found["broad"] = _mean(dataset["entropy"] / largest.where(largest > 0))
        scores.append((EVEN, {"broad": found["broad"]}))
    if "at" in dataset:
        found |= _around(dataset["at"])
        scores.append((ONE_PLACE, {"own-patch": found["own_patch"], "neighbour": found["neighbour"]}))
        scores.append((AROUND, {"surroundings": found["surroundings"]}))
    if "mass" in dataset and "sink" in dataset["segment"].values:
        found["class_token"] = _mean(dataset["mass"].sel(segment="sink", drop=True))
        scores.append((ONE_PLACE, {"class-token": found["class_token"]}))
    summary = xr.Dataset({name: array.transpose("layer", "head") for name, array in found.items()})
    return summary.assign(_kinds(scores))


def _mean(array: xr.DataArray) -> xr.DataArray:
    over = [name for name in array.dims if name not in ("layer", "head", "target")]
    return array.mean(over, dtype=np.float64)


def _around(at: xr.DataArray) -> dict[str, xr.DataArray]:
    means = _mean(at)
    own = means.sel(target="own patch", drop=True)
    beside = means.drop_sel(target="own patch")
    total = _mean(at.sum("target", min_count=1))
    known = beside.fillna(-1)
    best = known.max("target")
    return {
        "own_patch": own,
        "neighbour": best.where(best >= 0),
        "direction": beside["target"].isel(target=known.argmax("target")).drop_vars("target"),
        "surroundings": total,
    }


def _kinds(rules: list[tuple[float, dict[str, xr.DataArray]]]) -> dict[str, xr.DataArray]:
    """The first rule that holds for each head, and the share that decided."""
    like = next(iter(rules[0][1].values())).transpose("layer", "head") if rules else None
    if like is None:
        return {}
    kind = np.where(like.notnull(), "mixed", "").astype("U14")
    score, undecided = np.where(like.notnull(), 0.0, np.nan), like.notnull().values
    for needed, named in rules:
        shares = np.nan_to_num(np.stack([array.transpose("layer", "head").values for array in named.values()]))
        best = shares.max(0)
        holds = undecided & (best >= needed)
        kind[holds] = np.array(list(named))[shares.argmax(0)][holds]
        score[holds] = best[holds]
        undecided = undecided & ~holds
        score[undecided] = np.maximum(score, best / needed)[undecided]
    return {"kind": like.copy(data=kind), "score": like.copy(data=score)}
