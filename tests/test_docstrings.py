"""Public functions say what they take: each argument by its name, where there are three or more,
and no argument that there is not."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "ship_ds").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef
_ARGUMENTS = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
_NAMES = re.compile(r"^ {4}([*\w]+(?:, [*\w]+)*):", re.MULTILINE)


@cache
def tree_of(path: Path) -> ast.Module:
    """Not at the top: every worker of pytest imports this file, and one runs it."""
    return ast.parse(path.read_text())


@cache
def classes() -> dict[str, ast.ClassDef]:
    """All of the package, by name."""
    nodes = [node for path in FILES for node in ast.walk(tree_of(path))]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def public(node: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """Functions of a module and methods of its classes, each with its class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child)
        elif isinstance(child, Function) and not child.name.startswith("_"):
            yield (node if isinstance(node, ast.ClassDef) else None), child


def names_of(bases: list[ast.expr]) -> list[str]:
    """Trained[T], nn.Module -> ["Trained", "Module"]."""
    plain = (base.value if isinstance(base, ast.Subscript) else base for base in bases)
    return [getattr(base, "id", getattr(base, "attr", "")) for base in plain]


def is_described_elsewhere(owner: ast.ClassDef | None, name: str) -> bool:
    """Whether a method does what a class above it says of it, or a protocol that this one follows
    whole."""
    if owner is None:
        return False
    known = classes()
    own = methods_of(owner)
    for base in names_of(owner.bases):
        above = known.get(base)
        if above is None or above is owner:
            continue
        if name in methods_of(above) or is_described_elsewhere(above, name):
            return True
    return any(
        methods_of(one).keys() <= own.keys()
        and name in methods_of(one)
        and parameters(methods_of(one)[name]) == parameters(own[name])
        for one in known.values()
        if one is not owner and "Protocol" in names_of(one.bases)
    )


def methods_of(owner: ast.ClassDef) -> dict[str, Function]:
    """Those that it defines itself, by name."""
    return {one.name: one for one in owner.body if isinstance(one, Function)}


def parameters(function: Function) -> list[str]:
    """The named ones, as it is called."""
    taken = function.args
    every = [one.arg for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
    return [one for one in every if one not in ("self", "cls")]


def others(function: Function) -> list[str]:
    """*args and **kwargs."""
    return [one.arg for one in (function.args.vararg, function.args.kwarg) if one is not None]


def described(function: Function) -> list[str] | None:
    """The names under "Args:"; None where there is no such section."""
    section = _ARGUMENTS.search(ast.get_docstring(function) or "")
    if section is None:
        return None
    lists = _NAMES.findall(section[1])
    return [name.lstrip("*") for names in lists for name in names.split(", ")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_arguments_are_described(path: Path) -> None:
    is_verbs = path.parent.name == "cli"  # their options have help texts
    for owner, function in public(tree_of(path)):
        wanted, found = parameters(function), described(function)
        where = f"{path.name}:{function.lineno} {function.name}"
        if found is not None:
            assert set(found) <= {*wanted, *others(function)}, where
        if is_verbs or len(wanted) < 3 or is_described_elsewhere(owner, function.name):
            continue
        assert set(wanted) <= set(found or ()), where


def test_a_missing_and_a_foreign_argument_are_seen() -> None:
    lines = [
        "x",
        "",
        "Args:",
        "    a, b: of f,",
        "        as it is.",
        "    c: d: e.",
        "",
        "Returns:",
    ]
    text = "".join(f"    {line}\n" for line in [*lines, "    g: h."])
    (function,) = ast.parse(f'def f(a, b, *c):\n    """{text.strip()}\n    """').body
    assert isinstance(function, ast.FunctionDef)
    assert described(function) == ["a", "b", "c"]
    assert (parameters(function), others(function)) == (["a", "b"], ["c"])
