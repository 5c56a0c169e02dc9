"""What benches found, printed as tables and kept as lines of JSON: one line a run, with its machine, commit and date."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """One run of a bench: where and when, how it was called, and every cell of its tables, as printed."""

    bench: str
    date: str
    commit: str
    machine: str
    torch: str
    arguments: list[str]
    cells: dict[str, str]

    def __str__(self) -> str:
        called = " ".join([self.bench, *self.arguments])
        return f"{called}, {self.date}, commit {self.commit}, torch {self.torch}, {self.machine}"


class Report:
    """Prints tables as they are made; on leaving the block without an error they are kept, where that is wanted.

    Args:
        bench: the name of the script, and of the file under ``bench/results``.
        save: whether to keep what was printed.
        width: of the console, in characters.
        folder: of the files.
    """

    def __init__(self, bench: str, save: bool, width: int = 120, folder: Path = FOLDER) -> None:
        self.bench, self.save, self.folder = bench, save, folder
        self.console = Console(width=width)
        self.cells: dict[str, str] = {}

    def __enter__(self) -> Report:
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        if self.save and error is None:
            keep(self.bench, self.cells, self.folder)

    def show(self, *tables: Table) -> None:
        """Print tables, and remember what they say."""
        for table in tables:
            self.console.print(table)
            self.cells |= cells(table)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The command line that benches have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--save", action="store_true", help="keep the figures in bench/results")
    return made


def cells(table: Table) -> dict[str, str]:
    """Each cell by its table's title, its row and its column; the first column names the rows."""
    names = [str(column.header) for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    title = f"{table.title}: " if table.title else ""
    return {
        f"{title}{row[0]}, {name}": cell for row in rows for name, cell in zip(names[1:], row[1:], strict=True) if cell
    }


def keep(bench: str, found: dict[str, str], folder: Path = FOLDER) -> Run:
    """Add a line to the results of a bench."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--save"]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(bench, date, commit(), machine(), torch.__version__, arguments, found)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{bench}.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(asdict(run), ensure_ascii=False), file=file)
    return run


def commit() -> str:
    """The commit that is checked out, with a plus where files of it were changed; "unknown" outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def machine() -> str:
    """What computes: the GPU where there is one, else the processor, and how many of its cores PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listed = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", listed.read_text()) if listed.exists() else []
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def runs(bench: str, folder: Path = FOLDER) -> list[Run]:
    """The runs of a bench that were kept, oldest first."""
    path = folder / f"{bench}.jsonl"
    if not path.exists():
        raise ValueError(f"no results of {bench!r} are kept; known are {', '.join(kept(folder)) or 'none'}")
    return [Run(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(folder: Path = FOLDER) -> list[str]:
    """The benches of which there are results."""
    return sorted(path.stem for path in folder.glob("*.jsonl"))


def comparison(before: Run, after: Run) -> Table:
    """What two runs found, cell by cell, and the ratio of the second to the first where a cell begins with a number."""
    table = Table("what", "before", "after", "ratio", title=f"{before}\n{after}")
    for name in before.cells | after.cells:
        was, now = before.cells.get(name, "–"), after.cells.get(name, "–")
        if was != now:
            table.add_row(name, was, now, ratio(was, now))
    return table


def ratio(was: str, now: str) -> str:
    """How many times as large the first number of a cell has become."""
    old, new = (re.match(r"[+-]?[\d,]*\.?\d+", cell) for cell in (was, now))
    if not old or not new:
        return ""
    numbers = [float(found[0].replace(",", "")) for found in (old, new)]
    return f"{numbers[1] / numbers[0]:.2f}×" if numbers[0] else ""


def chosen(found: list[Run], names: list[str]) -> tuple[Run, Run]:
    """The last two runs that were called alike; or those whose commits or dates begin with two names.

    Raises:
        ValueError: there are no two such runs.
    """
    if names:
        named = [[run for run in found if run.commit.startswith(name) or run.date.startswith(name)] for name in names]
        for name, of_name in zip(names, named, strict=True):
            if not of_name:
                known = ", ".join(f"{run.commit} ({run.date})" for run in found)
                raise ValueError(f"no run has a commit or a date that begins with {name!r}; there are {known}")
        return named[0][-1], named[1][-1]
    alike = [run for run in found if (run.arguments, run.machine) == (found[-1].arguments, found[-1].machine)]
    if len(alike) < 2:
        raise ValueError(
            f"there is but one run like the last: {found[-1]}; name two commits or dates to compare others"
        )
    return alike[-2], alike[-1]


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, and compare."""
    line = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = line.add_subparsers(required=True)
    compare = commands.add_parser("compare", help="what changed between two runs")
    compare.add_argument("name", nargs="?", help="of the bench; all by default")
    compare.add_argument("runs", nargs="*", help="beginnings of two commits or dates; the last two runs by default")
    compare.add_argument("--folder", type=Path, default=FOLDER, help="of the results")
    given = line.parse_args(arguments)
    if len(given.runs) not in (0, 2):
        line.error(f"name two runs to compare, or none; got {len(given.runs)}")
    for name in [given.name] if given.name else kept(given.folder):
        try:
            table = comparison(*chosen(runs(name, given.folder), given.runs))
        except ValueError as error:
            if given.name:
                line.error(str(error))
            print(f"{name}: {error}")
            continue
        Console().print(table)
