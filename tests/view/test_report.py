"""What a report holds, what it leaves out, and that nothing in it can break out of its place."""

import base64
import importlib
import json
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import xarray as xr

from regard.inputs import Picture
from regard.view import RunFacts, ShownPart, report

FACTS = RunFacts("MiniLM", "The Awakening", 24, 2, 3, 1.25, 313_000_000, 1_300_000_000, "cpu", "float32", "1.0")

MODULE = importlib.import_module("regard.view._report")


class Page(HTMLParser):
    """The elements of a report, its texts, and the data that its script reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def identifiers(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def parts(self) -> list[dict[str, Any]]:
        return list(json.loads(next(text for text in self.texts if text.startswith('{"parts"')))["parts"])

    def data(self) -> dict[str, Any]:
        (part,) = self.parts()
        return part


def test_a_full_report_has_all_sections_and_the_facts(small: xr.Dataset) -> None:
    page = Page(report(small, FACTS))
    assert {"heads-title", "kinds-title", "text-title", "map-title"} <= page.identifiers()
    text = " ".join(page.texts)
    for fact in ("MiniLM", "The Awakening", "1.2 s", "313 MB", "1.3 GB", "4 times the peak", "2 layers of 3"):
        assert fact in text


@pytest.mark.parametrize(
    ("variable", "sections"),
    [
        ("entropy", {"heads-title", "kinds-title"}),
        ("mean_distance", {"heads-title"}),
        ("mass", {"heads-title", "kinds-title"}),
        ("at", {"heads-title", "kinds-title"}),
        ("received", {"text-title"}),
        ("pooled", {"map-title"}),
    ],
)
def test_what_was_not_recorded_has_no_section(variable: str, sections: set[str], small: xr.Dataset) -> None:
    titles = {"heads-title", "kinds-title", "text-title", "map-title"}
    assert Page(report(small[[variable]], FACTS)).identifiers() & titles == sections


def test_nothing_to_report_is_an_error(small: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"nothing to report: the dataset holds other; it needs"):
        report(xr.Dataset({"other": small["entropy"]}), FACTS)


def test_the_data_says_which_heads_there_are_and_reads_as_text(small: xr.Dataset) -> None:
    data = Page(report(small, FACTS)).data()
    assert data["present"] == [[True, True, True], [True, True, False]]
    assert "".join(data["text"]["windows"][1]) == "the parrot, which hung in a cage."
    assert data["kinds"]["kind"][1][2] == ""
    assert data["pictures"]["shown"] == [4, 4]


def test_hostile_names_and_tokens_stay_text(small: xr.Dataset) -> None:
    hostile = ["</script><script>alert(1)</script>", "<b>", "&amp;", '"', "<!--", "\u2028", "${1}", "{{ 1 }}"]
    tokens = small["key_token"].astype(object)
    tokens[:, : len(hostile)] = hostile
    paths = ["</script><img src=x>", "'\"<b>"]
    dataset = small.assign_coords(key_token=tokens, layer=paths)
    facts = RunFacts("</title><b>\"&'", "{{ 7 * 7 }}</cite><b>", 24, 2, 3, 1.0, 1, 1, "<b>", "<b>", "<b>")
    page, plain = Page(report(dataset, facts)), Page(report(small, FACTS))
    for tag in ("script", "img", "title", "cite"):
        assert page.count(tag) == plain.count(tag)
    assert page.count("b") == plain.count("b")
    assert [piece.strip(" ") for piece in page.data()["text"]["windows"][0][:8]] == hostile
    assert page.data()["layers"] == paths
    assert "</title><b>\"&'" in page.texts


def test_a_report_needs_no_network(small: xr.Dataset) -> None:
    page = Page(report(small, FACTS))
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = next(attributes["content"] for tag, attributes in page.elements if "http-equiv" in attributes)
    assert str(policy).startswith("default-src 'none'")


def test_a_thousand_heads_on_two_thousand_tokens_stay_below_15_megabytes() -> None:
    generator = np.random.default_rng(0)
    dims = ("layer", "batch", "head")
    received = generator.random((32, 1, 32, 2000), np.float32)
    pooled = generator.random((32, 1, 32, 64, 64), np.float32)
    dataset = xr.Dataset({"received": ((*dims, "key"), received), "pooled": ((*dims, "row", "column"), pooled)})
    assert len(report(dataset, FACTS)) < 15_000_000


def test_a_recording_that_is_too_large_is_cut_to_its_first_windows(
    small: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BUDGET", 6 * 16)
    data = Page(report(small, FACTS)).data()
    assert len(data["text"]["windows"]) == 1
    assert data["text"]["tokens_left_out"] == 0
    assert data["pictures"]["windows"] == 1


def test_a_text_that_is_too_long_is_cut_to_its_first_tokens(small: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BUDGET", 6 * 5)
    data = Page(report(small, FACTS)).data()
    assert [len(window) for window in data["text"]["windows"]] == [5]
    assert data["text"]["tokens_left_out"] == 7


def test_passes_are_windows(small: xr.Dataset) -> None:
    data = Page(report(xr.concat([small, small], "pass"), FACTS)).data()
    assert data["windows"] == data["pictures"]["windows"] == len(data["text"]["windows"]) == 4


def test_fine_pictures_are_merged_into_fewer_blocks(small: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "SIDE", 2)
    pictures = Page(report(small, FACTS)).data()["pictures"]
    assert pictures["blocks"] == [4, 4]
    assert pictures["merged"] == 2
    assert pictures["shown"] == [2, 2]


@pytest.mark.parametrize("module", ["jinja2", "plotly.offline"])
def test_without_its_libraries_the_error_says_how_to_get_them(
    module: Any, small: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "regard\[report\]"'):
        report(small, FACTS)


PICTURE = Picture(b"\x89PNG not really", 2, 3, (2, 3, 4, 7, 8, 9))


def test_parts_have_pages_of_their_own_and_what_is_said_of_the_run(small: xr.Dataset) -> None:
    names = {"key_token": (("batch", "key"), [[f"key {n}" for n in range(12)]] * 2)}
    cross = small[["entropy", "received", "pooled"]].assign_coords(
        query_token=(("batch", "query"), [[f"query {n}" for n in range(12)]] * 2), **names
    )
    notes = ["the target was written by <the model>"]
    page = Page(report([ShownPart("Encoder", small), ShownPart("Cross-attention", cross)], FACTS, notes))
    encoder, other = page.parts()
    assert [statistic["name"] for statistic in other["statistics"]] == ["entropy"]
    assert {statistic["name"] for statistic in encoder["statistics"]} > {"entropy", "previous", "sink"}
    assert other["text"]["queries"][0][1].strip() == "query 1"
    assert other["text"]["windows"][0][1].strip() == "key 1"
    assert {"Encoder", "Cross-attention", notes[0]} <= {text.strip() for text in page.texts}


def test_patches_stand_on_the_picture(small: xr.Dataset) -> None:
    text = Page(report([ShownPart("Image", small, PICTURE)], FACTS)).data()["text"]
    source = text["picture"].pop("source")
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PICTURE.png
    assert text["picture"] == {"rows": 2, "columns": 3, "positions": [2, 3, 4, 7, 8, 9]}


def test_what_goes_between_segments_is_shown_for_every_head(small: xr.Dataset) -> None:
    segments = (("batch", "query"), [["sink"] + ["rest"] * 11] * 2)
    data = Page(report(small.assign_coords(query_segment=segments), FACTS)).data()
    shown = {statistic["title"]: statistic for statistic in data["statistics"]}
    share = small.mass.sel(segment="rest")[:, :, :, 0].mean("batch")  # of the first query, which is the sink's own
    np.testing.assert_allclose(shown["Sink → rest"]["values"][0], share[0], rtol=1e-3)
    assert shown["Sink → rest"]["values"][1][2] is None
