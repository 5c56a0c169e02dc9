"""What the single pictures show, and what they say when asked for something that is not there."""

import sys
from typing import Any

import numpy as np
import pytest
import xarray as xr

from regard.view import Plot, summarize
from tests.view.conftest import Recording


def test_heads_shows_the_summary(small: xr.Dataset) -> None:
    figure = Plot(small).heads("sink")
    np.testing.assert_allclose(figure.data[0].z, summarize(small)["sink"].values)


@pytest.mark.parametrize("statistic", ["entropy", "mean_distance", "local", "positional", "offset", "broad", "score"])
def test_heads_knows_every_number_of_the_summary(statistic: str, small: xr.Dataset) -> None:
    assert Plot(small).heads(statistic).layout.title.text


def test_tokens_of_one_head(small: xr.Dataset) -> None:
    figure = Plot(small).tokens(layer="encoder.1.attention", head=1, batch=1)
    np.testing.assert_allclose(figure.data[0].y, small["received"].values[1, 1, 1])


def test_tokens_is_a_mean_over_the_heads_there_are(small: xr.Dataset) -> None:
    figure = Plot(small).tokens(layer=1)
    np.testing.assert_allclose(figure.data[0].y, small["received"].values[1, 0, :2].mean(0))


def test_the_axis_of_tokens_ends_where_shares_are_faint() -> None:
    received = np.array([1.0, 1e-24, 0.5]).reshape(1, 1, 1, 3)
    figure = Plot(xr.Dataset({"received": (("layer", "batch", "head", "key"), received)})).tokens()
    assert figure.layout.yaxis.range == (-4, 0)
    figure = Plot(xr.Dataset({"received": (("layer", "batch", "head", "key"), 50 * received)})).tokens()
    assert figure.layout.yaxis.range[1] == pytest.approx(np.log10(50))


def test_tokens_are_labelled_as_text(small: xr.Dataset) -> None:
    assert Plot(small).tokens().data[0].text[:3] == ("the", "par", "rot")


def test_tokens_that_look_like_tags_stay_text(small: xr.Dataset) -> None:
    tokens = small["key_token"].copy()
    tokens[0, 0] = "<b>&"
    figure = Plot(small.assign_coords(key_token=tokens)).tokens()
    assert figure.data[0].text[0] == "&lt;b&gt;&amp;"


def test_the_rows_of_a_map_sum_to_one(small: xr.Dataset) -> None:
    figure = Plot(small).map(layer=0, head=2, batch=1)
    np.testing.assert_allclose(figure.data[0].customdata.sum(1), 1)
    assert figure.data[0].x.tolist() == [0, 3, 6, 9, 12]


def test_a_map_of_blocks_of_one_size_ends_with_the_text(recording: Recording) -> None:
    attention = np.full((1, 1, 1, 10, 10), 0.1)
    dataset = recording(attention).drop_vars("pooled")
    pooled = np.outer([4, 4, 2], [0.4, 0.4, 0.2])[None, None, None]
    dataset["pooled"] = (("layer", "batch", "head", "row", "column"), pooled)
    figure = Plot(dataset).map(0, 0)
    assert figure.data[0].x.tolist() == [0, 4, 8, 10]


def test_passes_count_as_entries_of_the_batch(small: xr.Dataset) -> None:
    passes = xr.concat([small, 2 * small], "pass")
    figure = Plot(passes).tokens(layer=0, head=0, batch=2)
    np.testing.assert_allclose(figure.data[0].y, 2 * small["received"].values[0, 0, 0])
    assert figure.data[0].text[0] == "the"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda plot: plot.heads("entropi"), r'no statistic "entropi"; did you mean "entropy"\? There are: '),
        (lambda plot: plot.heads("kind"), 'no statistic "kind"'),
        (lambda plot: plot.tokens(layer="encoder.1.atention"), r'did you mean "encoder.1.attention"'),
        (lambda plot: plot.tokens(layer=2), r"no layer 2; there are 2"),
        (lambda plot: plot.map(0, 3), r"no head 3; there are: 0, 1, 2"),
        (lambda plot: plot.map(0, 0, batch=2), r"no batch entry 2; there are 2"),
    ],
)
def test_an_unknown_name_is_told_with_the_known_ones(draw: Any, message: Any, small: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        draw(Plot(small))


def test_a_missing_variable_is_named(small: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"tokens\(\) needs the variable received; the dataset holds entropy"):
        Plot(small[["entropy"]]).tokens()


def test_without_plotly_the_error_says_how_to_get_it(small: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r'pip install "regard\[report\]"'):
        Plot(small).heads()
