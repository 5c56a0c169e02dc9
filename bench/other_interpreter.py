"""A module of the benches that another interpreter runs, for packages which no environment has beside regard's own."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from bench.results import ROOT


class OtherInterpreter:
    """Answers requests, each a line of JSON, and waits in between.

    Args:
        python: the interpreter.
        module: that it runs, which first says versions of packages by their names.
        arguments: of the module.

    Raises:
        RuntimeError: that interpreter could not import what it needs.
    """

    def __init__(self, python: str, module: str, *arguments: str) -> None:
        command = [python, "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.versions = ", ".join(f"{name} {version}" for name, version in self._line().items())

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other interpreter ended with {self._process.wait()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found
