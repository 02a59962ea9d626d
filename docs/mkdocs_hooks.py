"""Fills the parts of the reference that stand in the code.

A page holds ``<!-- generated: NAME ARGUMENT -->`` where the text belongs: ``metrics``, ``fields module:Struct`` or
``signature module:function``. mkdocs calls ``on_page_markdown`` for every page.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kvferry.connector import metrics
from kvferry.connector.memory import format_bytes
from kvferry.connector.schema import is_secret, is_size

_MARKER = re.compile(r"^<!-- generated: (\w+)(?: ([\w.:]+))? -->$", re.MULTILINE)
_WORDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def metrics_table(_: str) -> Iterator[str]:
    lines = list(metrics.reference())
    first = next(index for index, line in enumerate(lines) if line.startswith("|"))
    yield from lines[first:]


def fields_table(struct_path: str) -> Iterator[str]:
    """A table of a struct's fields: what an operator may write, the default, the docstring."""
    struct = imported(struct_path)
    docstrings = field_docstrings(struct)
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for field in msgspec.structs.fields(struct):
        kind = value_of(field.type, field.name)
        if kind is not None:
            default = "*required*" if field.required else f"`{shown(field.default, field.name)}`"
            yield f"| `{field.name}` | {kind} | {default} | {docstrings[field.name]} |"


def field_docstrings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The strings that stand below the fields, for the struct and what it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(struct.__mro__[:-1]):
        if base.__module__.startswith("kvferry"):
            (definition,) = ast.parse(inspect.getsource(base)).body
            assert isinstance(definition, ast.ClassDef)
            body = definition.body
            for field, text in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    name, docstring = ast.unparse(field.target), ast.literal_eval(text.value)
                    found[name] = " ".join(docstring.replace("``", "`").split())
    return found


def value_of(annotation: object, name: str) -> str | None:
    """What may be written for a field; None for a nested struct, which has a table of its own."""
    if is_size(name):
        return "size"
    info = msgspec.inspect.type_info(annotation)
    if isinstance(info, msgspec.inspect.StructType):
        return None
    if isinstance(info, msgspec.inspect.LiteralType):
        return ", ".join(f"`{value}`" for value in info.values)
    if isinstance(info, msgspec.inspect.VarTupleType):
        inner = info.item_type
        return "list of tables" if isinstance(inner, msgspec.inspect.DictType) else "list of text"
    return _WORDS[type(info).__name__.removesuffix("Type").lower()] + bounds(info)


def signature(function_path: str) -> Iterator[str]:
    """A function's signature and docstring."""
    function = imported(function_path)
    (definition,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.body = [], [ast.Expr(ast.Constant(...))]
    yield from ("```python", ast.unparse(definition), "```", "", inspect.getdoc(function) or "")


def bounds(info: object) -> str:
    signs = (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))
    limits = [(words, getattr(info, sign, None)) for sign, words in signs]
    return "".join(f", {words} {limit}" for words, limit in limits if limit is not None)


def shown(value: object, name: str) -> str:
    if is_size(name) and isinstance(value, int):
        return format_bytes(value)
    return msgspec.json.encode(value).decode() if not is_secret(name) else '""'


GENERATORS: dict[str, Callable[[str], Iterator[str]]] = {
    "fields": fields_table,
    "metrics": metrics_table,
    "signature": signature,
}


def on_page_markdown(markdown: str, **_: object) -> str:
    return _MARKER.sub(lambda marker: "\n".join(GENERATORS[marker[1]](marker[2] or "")), markdown)
