"""The package as a whole: what importing it loads, and that every module is found under its own name."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import regard

# Composed maps are built on token_map, whose operators make them.
MEANT = {"regard.maps.token_map": {"regard.maps"}}


def modules() -> list[str]:
    return [
        found.name for found in pkgutil.walk_packages(regard.__path__, "regard.") if not found.name.endswith("__main__")
    ]


def test_nothing_hides_a_module() -> None:
    hidden = []
    for name in modules():
        module = importlib.import_module(name)
        parent, _, leaf = name.rpartition(".")
        if getattr(importlib.import_module(parent), leaf) is not module:
            hidden.append(name)
    assert not hidden


def test_packages_are_called_by_their_own_name() -> None:
    assert isinstance(regard.steer, ModuleType)
    assert regard.steer.language.pasta.__module__ == "regard.steer.language._pasta"
    assert isinstance(regard.steer(None, regard.Gate(0)), regard.steer.steer)
    assert isinstance(regard.watch(regard.Entropy()), regard.watch.watch)
    assert regard.mini.path().is_dir()


def test_importing_loads_no_method_of_a_paper_and_nothing_heavy() -> None:
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import regard; print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    methods = ("regard.cache", "regard.mixers", "regard.steer.language", "regard.steer.vision", "regard.view")
    assert not [name for name in loaded if name.startswith(methods)]
    assert not {"xarray", "pandas", "transformers", "plotly", "h5py", "scipy"} & set(loaded)


def test_importing_alone_waits_for_nothing() -> None:
    """Help and completion on the command line are there at once; what is public is loaded when it is asked for."""
    code = (
        "import sys, regard, regard.cli; print('torch' in sys.modules); regard.Entropy; print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["False", "True"]


def test_type_checkers_see_what_is_public() -> None:
    (stated,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(Path(regard.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign)
    )
    assert sorted(stated) == sorted(regard.__all__)
    assert {name for name in stated if getattr(regard, name) is None} == set()
    with pytest.raises(AttributeError, match="module 'regard' has no attribute 'attend'"):
        regard.__getattr__("attend")


def imports(statements: Iterable[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run when a module is imported: not in functions, nor for type checkers alone."""
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            typing = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
            for block in ("orelse",) if typing else ("body", "orelse", "finalbody", "handlers"):
                yield from imports(getattr(statement, block, ()))


def imported(source: str, known: Iterable[str]) -> set[str]:
    """Which of the known modules a source imports when it is imported itself."""
    found = set()
    for statement in imports(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            found |= {name.name for name in statement.names}
        else:
            assert not statement.level, "imports are absolute"
            places = [f"{statement.module}.{name.name}" for name in statement.names]
            found |= {place if place in known else str(statement.module) for place in places}
    return found & set(known)


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import one another in a circle, or none."""
    graph = {name: imported(source, sources) - MEANT.get(name, set()) for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_one_another_in_a_circle() -> None:
    files = {name: importlib.import_module(name).__file__ for name in ("regard", *modules())}
    assert circle({name: Path(str(file)).read_text(encoding="utf-8") for name, file in files.items()}) == []


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("from regard.b import x", True),
        ("from regard import b", True),
        ("import regard.b", True),
        ("class C:\n    try:\n        import regard.b\n    except ImportError:\n        pass", True),
        ("try:\n    pass\nexcept ImportError:\n    import regard.b", True),
        ("def f():\n    from regard import b", False),
        ("if TYPE_CHECKING:\n    from regard import b", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from regard import b", True),
        ("import regard.bee", False),
    ],
)
def test_circles_are_found(written: str, found: bool) -> None:
    sources = {"regard": "", "regard.a": written, "regard.b": "from regard.c import y", "regard.c": "import regard.a"}
    assert bool(circle(sources)) == found
