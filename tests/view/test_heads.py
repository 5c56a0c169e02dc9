"""What a summary says about heads whose attention is known."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from regard.view import heads, summarize
from tests.view.conftest import Recording

SIZE = 64


def head_at(offset: int, share: float = 0.9) -> np.ndarray:
    """Give `share` to the token at a fixed offset and the rest evenly to all."""
    attention = np.full((SIZE, SIZE), (1 - share) / SIZE)
    for query in range(SIZE):
        attention[query, np.clip(query + offset, 0, SIZE - 1)] += share
    return attention


def to_the_first(share: float) -> np.ndarray:
    attention = np.full((SIZE, SIZE), (1 - share) / SIZE)
    attention[:, 0] += share
    return attention


def nearby() -> np.ndarray:
    distance = np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))
    attention: np.ndarray = (distance <= 6).astype(float)
    return attention / attention.sum(-1, keepdims=True)


def causal(attention: np.ndarray) -> np.ndarray:
    attention = np.tril(attention)
    return attention / attention.sum(-1, keepdims=True)


HEADS = {
    "previous-token": head_at(-1),
    "own-token": head_at(0),
    "positional": head_at(3),
    "sink": to_the_first(0.7),
    "local": nearby(),
    "broad": head_at(0, 0.0),
    "mixed": (head_at(30) + head_at(20) + head_at(-20)) / 3,
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_gets_its_kind(kind: str, recording: Recording) -> None:
    summary = summarize(recording(HEADS[kind][None, None, None]))
    assert summary["kind"].item() == kind


@pytest.mark.parametrize("kind", ["previous-token", "own-token", "sink", "broad"])
def test_a_causal_head_gets_its_kind(kind: str, recording: Recording) -> None:
    assert summarize(recording(causal(HEADS[kind])[None, None, None]))["kind"].item() == kind


def test_shares_are_means_over_the_queries_that_have_the_target(recording: Recording) -> None:
    summary = summarize(recording(head_at(-1)[None, None, None]))
    even = 0.1 / SIZE
    assert summary["previous"].item() == pytest.approx(0.9 + even)
    assert summary["own"].item() == pytest.approx((0.9 + SIZE * even) / SIZE)
    assert summary["sink"].item() == pytest.approx(even + 2 * 0.9 / SIZE)


def test_local_counts_each_near_token_once(recording: Recording) -> None:
    attention = nearby()
    summary = summarize(recording(attention[None, None, None]))
    assert summary["local"].item() == pytest.approx(1)
    assert summary["positional"].item() < 0.2


def test_local_needs_all_offsets_before_the_query(recording: Recording) -> None:
    dataset = recording(nearby()[None, None, None]).sel(target=["previous", "own", "-2"])
    assert "local" not in summarize(dataset)


def test_positional_names_its_offset(recording: Recording) -> None:
    heads = np.stack([head_at(3), head_at(-2)])
    assert summarize(recording(heads[None, None]))["offset"].values.tolist() == [[3, -2]]


def test_even_attention_is_as_broad_as_can_be_with_and_without_a_causal_mask(recording: Recording) -> None:
    even = head_at(0, 0.0)
    for attention in (even, causal(even)):
        assert summarize(recording(attention[None, None, None]))["broad"].item() == pytest.approx(1)


def test_broad_knows_how_many_keys_each_window_has(recording: Recording) -> None:
    dataset = recording(head_at(0, 0.0)[None, None, None])
    short = recording(np.full((1, 1, 1, 16, 16), 1 / 16)).reindex(query=dataset["query"], key=dataset["key"])
    both = xr.concat([dataset[["entropy", "received"]], short[["entropy", "received"]]], "batch")
    assert summarize(both)["broad"].item() == pytest.approx(1)


def test_what_a_head_does_where_it_does_not_rest_is_told(recording: Recording) -> None:
    attention = 0.6 * to_the_first(1.0) + 0.4 * head_at(-1, 1.0)
    summary = summarize(recording(attention[None, None, None]))
    assert summary["kind"].item() == "sink"
    assert summary["beside"].item() == "previous-token"
    assert summarize(recording(to_the_first(0.6)[None, None, None]))["beside"].item() == ""


def test_scores_are_shares_beyond_chance_and_compare(recording: Recording) -> None:
    four = np.stack([head_at(-1, 0.5), head_at(-1, 0.25), to_the_first(0.5), nearby()])
    summary = summarize(recording(four[None, None]))
    even = 1 / SIZE
    assert summary["score"].values[0] == pytest.approx([0.5, 0.25, 0.5, 0.7], abs=3 * even)
    assert summary["kind"].values.tolist() == [["previous-token", "previous-token", "sink", "local"]]


def test_noise_has_no_kind_of_its_own(recording: Recording) -> None:
    """Heads that look somewhere by chance are not named after it, however many there are."""
    generator = np.random.default_rng(1)
    noise = causal(np.exp(2 * generator.normal(size=(6, 1, 20, SIZE, SIZE))))
    assert set(summarize(recording(noise))["kind"].values.ravel()) <= {"broad", "mixed"}


def test_a_share_that_chance_would_give_too_names_no_head() -> None:
    """What goes to the targets goes to others at these distances as well."""
    generator = np.random.default_rng(2)
    share = 0.3 + 0.05 * generator.normal(size=(1, 1, 2, 200, 1))
    chance = share[:, :, ::-1] - np.array([0.0, 0.2])[:, None, None]
    at = np.concatenate([share, chance], -1)
    dims = ("layer", "batch", "head", "query", "target")
    summary = summarize(xr.Dataset({"at": (dims, at)}, {"target": ["induction", "induction by chance"]}))
    assert summary["kind"].values.tolist() == [["mixed", "induction"]]
    assert summary["score"].values[0] == pytest.approx([0, 0.2], abs=0.02)


@pytest.mark.parametrize(
    ("t", "freedom", "likelihood"), [(2.0, 31, 0.0271583), (5.0, 31, 1.074e-5), (-1.0, 9, 0.828282)]
)
def test_likelihood_of_a_mean(t: float, freedom: int, likelihood: float) -> None:
    assert heads._tail(np.array([t]), np.array([freedom])) == pytest.approx(likelihood, rel=0.02)


@pytest.mark.parametrize("target", ["induction", "retrieval"])
def test_targets_are_read_where_there_was_an_earlier_occurrence(target: Any) -> None:
    at = np.array([np.nan, np.nan, 0.8, 0.6, 0.7, 0.7, 0.7]).reshape(1, 1, 1, 7, 1)
    dims = ("layer", "batch", "head", "query", "target")
    summary = summarize(xr.Dataset({"at": (dims, at)}, {"target": [target]}))
    assert summary[target].item() == pytest.approx(0.7)
    assert summary["kind"].item() == target


def test_a_head_that_a_layer_lacks_has_no_kind(small: xr.Dataset) -> None:
    summary = summarize(small)
    assert summary["kind"].values[1, 2] == ""
    assert np.isnan(summary["score"].values[1, 2])
    assert (summary["kind"].values != "").sum() == 5


def test_the_score_of_a_mixed_head_is_nothing(recording: Recording) -> None:
    assert summarize(recording(HEADS["mixed"][None, None, None]))["score"].item() == 0


@pytest.mark.parametrize("name", ["entropy", "mean_distance", "mass", "at"])
def test_a_variable_alone_is_enough(name: Any, small: xr.Dataset) -> None:
    assert len(summarize(small[[name]]).data_vars) > 0


def test_mean_distance_alone_names_no_kind(small: xr.Dataset) -> None:
    assert "kind" not in summarize(small[["mean_distance"]])


def test_nothing_to_summarize_names_what_there_is_and_what_is_needed(small: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"holds received, pooled; it needs at least one of entropy"):
        summarize(small[["received", "pooled"]])
