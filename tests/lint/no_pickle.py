"""Refuse code that can turn stored or received bytes into running code.

    python tests/lint/no_pickle.py connector plugins engines cuda

Blocks come from disks and networks, so nothing in kvferry may use a format that can execute what it reads: pickle and
its relatives, marshal, shelve, ``torch.load``, ``yaml.load``, ``eval``, ``exec``. Names are followed through ``import``
and ``as``; there is no way to allow a line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODULES = {
    "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve",
    "multiprocessing.connection", "multiprocessing.managers",
}  # fmt: skip
"""Neither imported nor named; their submodules neither."""

CALLABLES = {
    "eval", "exec", "builtins.eval", "builtins.exec",
    "pandas.read_pickle", "torch.load", "torch.save", "torch.jit.load",
    "yaml.full_load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
"""Neither called, nor imported, nor passed around."""

IMPORTERS = {"__import__", "importlib.import_module"}


class Violation(NamedTuple):
    """One place that breaks the rule."""

    line: int
    what: str


def violations(source: str) -> list[Violation]:
    """Return what in ``source`` breaks the rule, in line order."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = {hit for node in ast.walk(tree) for hit in check(node, names)}
    return sorted(found)


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Map every local name that an import binds, anywhere in the module, to what it stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def check(node: ast.AST, names: dict[str, str]) -> Iterator[Violation]:
    """Yield the violations of one syntax node."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        dotted = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Name | ast.Attribute):
        dotted = [resolve(node, names)]
    elif isinstance(node, ast.Call):
        yield from check_call(node, names)
        return
    else:
        return
    for name in dotted:
        if is_forbidden(name):
            yield Violation(node.lineno, name)


def check_call(node: ast.Call, names: dict[str, str]) -> Iterator[Violation]:
    """Yield what only the arguments of a call give away."""
    called = resolve(node.func, names)
    target = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
    if called in IMPORTERS and is_forbidden(str(target)):
        yield Violation(node.lineno, f"{called}({target!r})")
    for keyword in node.keywords:
        is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not is_off:
            yield Violation(node.lineno, "allow_pickle")


def resolve(node: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name that an expression stands for, or an empty string."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (base := resolve(node.value, names)):
        return f"{base}.{node.attr}"
    return ""


def is_forbidden(name: str) -> bool:
    """Tell whether a dotted name is, or lies in, something forbidden."""
    return name in CALLABLES or any(name == module or name.startswith(f"{module}.") for module in MODULES)


def main(folders: list[str]) -> int:
    """Check every Python file below ``folders``; 1 when anything is found or nothing was looked at."""
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    hits = [(file, hit) for file in files for hit in violations(file.read_text())]
    for file, hit in hits:
        print(f"{file}:{hit.line}: {hit.what} can run what it reads")
    print(f"no-pickle rule: {len(files)} files, {len(hits)} violations")
    return 1 if hits or not files else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
