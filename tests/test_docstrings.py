"""Every public docstring begins with a line that says what the thing is, to one who reads that line alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import regard

PACKAGE = Path(regard.__file__).parent
# Files whose docstrings are still to be mended; none may be added.
LEANING = ("The same", "Ditto", "None.", "None:", "Nothing.")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public(node: Documented, path: str) -> Iterator[tuple[str, Documented]]:
    """A module, class or function, and what is public in it; what stands inside a function is nobody's to call."""
    yield path, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if inner.name.startswith("_") or is_overload(inner):
                    continue
                yield from public(inner, f"{path}.{inner.name}")


def is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)


def complaint(docstring: str | None) -> str | None:
    """What is wrong with the first line, or None."""
    if not docstring or not docstring.strip():
        return "is missing"
    first = docstring.strip().splitlines()[0]
    if first.startswith(LEANING):
        return f"leans on something else: {first!r}"
    if len(first.split()) < 3:
        return f"says too little: {first!r}"
    return None


def modules() -> list[str]:
    paths = (path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py")))
    return [path for path in paths if is_public(path)]


def is_public(path: str) -> bool:
    return not any(part.startswith("_") and part != "__init__.py" for part in path.split("/"))


@pytest.mark.parametrize("path", modules())
def test_first_lines_stand_alone(path: str) -> None:
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    dotted = path.removesuffix(".py").replace("/", ".")
    found = {name: complaint(ast.get_docstring(node)) for name, node in public(tree, dotted)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("docstring", "wrong"),
    [
        (None, "is missing"),
        ("", "is missing"),
        ("None.", "leans"),
        ("The same of changed tensors, each (B, H, N, ...).", "leans"),
        ("The window.", "says too little"),
        ("``P V``.", "says too little"),
        ("Mass on segments: ``m_s = Σ_{j ∈ s} P_ij``.", None),
    ],
)
def test_what_is_refused(docstring: str | None, wrong: str | None) -> None:
    found = complaint(docstring)
    assert found is None if wrong is None else wrong in str(found)
