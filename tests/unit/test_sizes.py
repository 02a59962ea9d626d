"""Modules and functions stay small enough to be read in one go.

The caps hold for the four packages and for the tests. An exception is listed here with its reason, and is
removed from the list once it is no longer one.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("connector", "plugins", "engines", "cuda")

MODULE_LINES = 500
TEST_MODULE_LINES = 800
FUNCTION_LINES = 80
FUNCTION_LINES_P90 = 35

MODULE_EXCEPTIONS: dict[str, str] = {}
"""Path relative to the repository: why it may be longer."""

FUNCTION_EXCEPTIONS: dict[str, str] = {}
"""``path::qualified_name``: why it may be longer."""


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def function_lengths(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the qualified name and line count (decorators and docstring excluded) of every function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child, clean=False)
            first = child.body[1] if docstring is not None and len(child.body) > 1 else child.body[0]
            signature = child.body[0].lineno - child.lineno
            yield f"{prefix}{child.name}", signature + (child.end_lineno or 0) - first.lineno + 1
        is_scope = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from function_lengths(child, f"{prefix}{child.name}." if is_scope else prefix)


def all_functions(*folders: str) -> dict[str, int]:
    lengths = {}
    for path in modules(*folders):
        for name, lines in function_lengths(ast.parse(path.read_text())):
            lengths[f"{name_of(path)}::{name}"] = lines
    return lengths


@pytest.mark.parametrize(
    ("folders", "cap"), [(PACKAGES, MODULE_LINES), (("tests", "benchmarks"), TEST_MODULE_LINES)]
)
def test_no_module_is_longer_than_its_cap(folders: tuple[str, ...], cap: int) -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules(*folders)}
    too_long = {name: lines for name, lines in lengths.items() if lines > cap}
    assert {name: lines for name, lines in too_long.items() if name not in MODULE_EXCEPTIONS} == {}


def test_no_function_is_longer_than_the_cap() -> None:
    too_long = {name: lines for name, lines in all_functions(*PACKAGES).items() if lines > FUNCTION_LINES}
    assert {name: lines for name, lines in too_long.items() if name not in FUNCTION_EXCEPTIONS} == {}


def test_nine_functions_of_ten_fit_a_screen() -> None:
    lengths = list(all_functions(*PACKAGES).values())
    assert statistics.quantiles(lengths, n=10)[-1] <= FUNCTION_LINES_P90


def test_every_exception_is_still_needed() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules(*PACKAGES, "tests")}
    assert [name for name in MODULE_EXCEPTIONS if lengths.get(name, 0) <= MODULE_LINES] == []
    functions = all_functions(*PACKAGES)
    assert [name for name in FUNCTION_EXCEPTIONS if functions.get(name, 0) <= FUNCTION_LINES] == []


def test_a_long_function_is_seen() -> None:
    source = "class A:\n    def f(self):\n" + "        x = 1\n" * 90
    assert dict(function_lengths(ast.parse(source))) == {"A.f": 91}
