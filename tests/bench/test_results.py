"""Results of benches are kept with where they come from, and two runs are told apart."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bench.results import Report, Run, cells, chosen, commit, comparison, main, ratio, runs
from rich.table import Table

RUN = Run("steer", "2026-01-01T00:00:00+00:00", "aaa1111", "two cores", "2.13.0", [], {"N, time": "1.50×", "gone": "3"})


def table(**rows: str) -> Table:
    made = Table("edit", "ratio", title="N = 64")
    for name, cell in rows.items():
        made.add_row(name, cell)
    return made


def keep(folder: Path, *found: Run) -> None:
    (folder / "steer.jsonl").write_text("".join(f"{json.dumps(asdict(run))}\n" for run in found), encoding="utf-8")


def test_what_is_printed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--save"])
    for cell in ("1.50×", "1.20×"):
        with Report("steer", save=True, folder=tmp_path) as report:
            report.show(table(one=cell, none=""))
    first, second = runs("steer", tmp_path)
    assert first.cells == {"N = 64: one, ratio": "1.50×"}
    assert second.cells == {"N = 64: one, ratio": "1.20×"}
    assert first.arguments == ["--quick"]
    assert re.fullmatch(r"unknown|[0-9a-f]{7,40}\+?", first.commit)
    assert first.commit == commit()
    assert first.machine
    assert re.match(r"\d{4}-\d\d-\d\dT", first.date)


def test_nothing_is_kept_unasked_or_of_a_run_that_failed(tmp_path: Path) -> None:
    with Report("steer", save=False, folder=tmp_path) as report:
        report.show(table(one="1"))
    with pytest.raises(ZeroDivisionError), Report("steer", save=True, folder=tmp_path) as report:
        report.show(table(one=str(1 / 0)))
    assert not list(tmp_path.iterdir())


def test_comparison_shows_what_changed() -> None:
    after = replace(RUN, cells={"N, time": "1.20× of 3", "new": "7", "same": "1"})
    shown = comparison(replace(RUN, cells=RUN.cells | {"same": "1"}), after)
    assert cells(shown) == {
        f"{shown.title}: {row}, {column}": cell
        for row, *found in (("N, time", "1.50×", "1.20× of 3", "0.80×"), ("gone", "3", "–"), ("new", "–", "7"))
        for column, cell in zip(("before", "after", "ratio"), found, strict=False)
    }


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ("2.0×", "3.0×", "1.50×"),
        ("1,000 ms", "500 ms", "0.50×"),
        ("+0.5", "-0.5", "-1.00×"),
        ("0", "1", ""),
        ("–", "1", ""),
    ],
)
def test_ratio(was: str, now: str, expected: str) -> None:
    assert ratio(was, now) == expected


def test_runs_are_chosen() -> None:
    quick, other = replace(RUN, arguments=["--quick"]), replace(RUN, commit="bbb2222", date="2026-02-01")
    assert chosen([RUN, quick, other], []) == (RUN, other)
    assert chosen([RUN, quick, other], ["2026-02", "aaa"]) == (other, quick)
    with pytest.raises(ValueError, match="there is but one run like the last: steer --quick, 2026"):
        chosen([RUN, quick], [])
    with pytest.raises(ValueError, match=r"begins with 'ccc'; there are aaa1111 \(2026-01-01T"):
        chosen([RUN, other], ["aaa", "ccc"])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, RUN, replace(RUN, cells={"N, time": "3.00×", "gone": "3"}))
    main(["compare", "steer", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"N, time.+1\.50×.+3\.00×.+2\.00×", printed)
    assert "gone" not in printed
    with pytest.raises(SystemExit):
        main(["compare", "stear", "--folder", str(tmp_path)])
    assert "no results of 'stear' are kept; known are steer" in capsys.readouterr().err
