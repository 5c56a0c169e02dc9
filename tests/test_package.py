"""The package as a whole: what importing it loads, and that every module is found under its own name."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import regard


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
