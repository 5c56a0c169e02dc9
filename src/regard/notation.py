"""Edits and policies as one writes them in Python, read from text: a name, and plain values for its arguments."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import isabstract, signature
from typing import Any

from torch import Tensor

from regard import masks
from regard.masks import Mask


def parse(text: str, base: type, what: str, example: str, parts: type | None = None, **given: Any) -> Any:
    """Make an instance of a subclass of ``base`` from its name and arguments; ``given`` are further arguments.

    Arguments are plain values, or further instances: of subclasses of ``parts``, or else of ``base``.

    Raises:
        ValueError: anything but a known name, or a call of it with plain values.

    >>> from regard.cache import Policy
    >>> print(parse("snapkv(window=8)", Policy, "policy", "SnapKV(window=16)", budget=0.25))
    SnapKV(budget=0.25, window=8)
    >>> parse("ChunkKV(Knorm(budget=64), length=5)", Policy, "policy", "SnapKV(window=16)").policy.budget
    64
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read the {what} {text!r}: {error.msg}") from error
    call = ast.Call(call, [], []) if isinstance(call, ast.Name) else call
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        article = "an" if what[0] in "aeiou" else "a"
        raise ValueError(f'expected {article} {what} such as {example}, got "{text}"')
    kind = kind_named(call.func.id, base, what)
    names = [field.name for field in fields(kind) if not field.kw_only]
    inner = base if parts is None else parts
    if len(call.args) > len(names):
        raise ValueError(f"{kind.__name__} takes at most {len(names)} arguments without a name, got {len(call.args)}")

    def value(node: ast.expr) -> Any:
        name = node.func if isinstance(node, ast.Call) else node
        if isinstance(name, ast.Name) and (_is_known(name.id, inner) or (parts is not None and _is_rule(node))):
            return parse(ast.unparse(node), inner, what, example, parts)
        return _literal(node, text)

    arguments = dict(zip(names, (value(node) for node in call.args), strict=False))
    arguments |= {word.arg: value(word.value) for word in call.keywords if word.arg}
    twice = [name for name in arguments if name in given]
    if twice:
        raise ValueError(f"{kind.__name__}: {twice[0]} is given twice, as {given[twice[0]]!r} and in {text!r}")
    return make(kind, given | arguments)


def kind_named(name: str, base: type, what: str) -> Any:
    """The subclass of this name, in capitals or not."""
    known = {kind.__name__: kind for kind in _subclasses(base) if _is_named(kind)}
    plain = {_plain(written): written for written in known}
    if name not in known and _plain(name) not in plain:
        near = get_close_matches(_plain(name), plain, 1, 0.5)
        hint = f"; did you mean {plain[near[0]]}?" if near else f"; known are {', '.join(sorted(known))}"
        raise ValueError(f"there is no {what} {name!r}{hint}")
    return known.get(name) or known[plain[_plain(name)]]


def make(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """An instance, or a ValueError that says which arguments there are."""
    known = [field.name for field in fields(kind)]
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{kind.__name__} has no argument {argument!r}; it takes {', '.join(known) or 'none'}")
    try:
        return kind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "nothing"
        raise ValueError(f"{kind.__name__} cannot be made from {given}: {error}") from error


def _is_named(kind: Any) -> bool:
    """Whether it is for users to write: neither private nor a base of others."""
    return not kind.__name__.startswith("_") and not isabstract(kind)


def _is_known(name: str, base: type) -> bool:
    return _plain(name) in {_plain(kind.__name__) for kind in _subclasses(base) if _is_named(kind)}


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _subclasses(kind: Any) -> Iterator[Any]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def differs(value: Any, default: Any) -> bool:
    """Whether an argument is to be written: it is something else than its default.

    >>> differs(0.3, 0.3), differs([0], None)
    (False, True)
    """
    return value is not default and not (
        isinstance(value, type(default)) and not isinstance(value, Tensor) and value == default
    )


def written(made: object) -> str:
    """What was made of a class as one would write it, without arguments left at their default; they are its attributes.

    >>> import regard
    >>> written(regard.Sinks(threshold=0.5))
    'Sinks(threshold=0.5)'
    """
    parameters, own = signature(type(made)).parameters, vars(made)
    given = {name: own[name] for name, it in parameters.items() if name in own and differs(own[name], it.default)}
    return f"{type(made).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def rule(text: str) -> Mask:
    """Make a mask from its notation: names of `regard.masks`, called with plain values, and ``&``, ``|``, ``~``.

    Raises:
        ValueError: anything else.

    >>> rule("window(left=3, right=0) | keys([0])")
    window(left=3, right=0) | keys([0])
    """
    return _rule(ast.parse(text, mode="eval").body, text)


def _is_rule(node: ast.expr) -> bool:
    """Whether it is written as a rule: an operator on rules, or the call of a name that is none of Python's."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Invert)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitAnd | ast.BitOr)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id)


def _rule(node: ast.expr, text: str) -> Mask:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_rule(node.operand, text)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        left, right = _rule(node.left, text), _rule(node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f'"{ast.unparse(node)}" in {text!r} is no rule, as window(left=255, right=0) is')
    known = {name for name in masks.__all__ if name.islower() and not name.startswith("from_")}
    name = node.func.id
    if name not in known:
        near = get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise ValueError(f"there is no rule {name!r}; {hint}")
    arguments = [_literal(argument, text) for argument in node.args]
    try:
        made: Mask = getattr(masks, name)(
            *arguments, **{w.arg: _literal(w.value, text) for w in node.keywords if w.arg}
        )
    except TypeError as error:
        raise ValueError(f"{ast.unparse(node)}: {error}") from error
    return made


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("slice", "range"):
        numbers = [ast.literal_eval(argument) for argument in node.args]
        return slice(*numbers) if node.func.id == "slice" else range(*numbers)
    if _is_rule(node):
        return _rule(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f'"{ast.unparse(node)}" in {text!r} is no plain value') from error
