"""Fills the parts of the reference that stand in the code.

A page holds ``<!-- generated: NAME ARGUMENT -->`` where the text belongs: ``checks``, ``metrics``,
``fields module:Struct``, ``message module:Struct`` or ``signature module:function``. mkdocs calls
``on_page_markdown`` for every page.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from kvferry import connector
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
            default = "*required*" if field.required else f"`{shown(default_of(field), field.name)}`"
            yield f"| `{field.name}` | {kind} | {default} | {docstrings[field.name]} |"


def default_of(field: msgspec.structs.FieldInfo) -> object:
    """The value of a field that is not given."""
    factory = field.default_factory
    return field.default if factory is msgspec.NODEFAULT else factory()


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


def message_table(struct_path: str) -> Iterator[str]:
    """What a message of the protocol is for, and a table of its fields as they are packed."""
    struct = imported(struct_path)
    docstrings = alias_docstrings(struct) | field_docstrings(struct)
    text = " ".join((struct.__doc__ or "").split())
    if not text.startswith("See "):  # the page itself says it
        yield from (linked(text, struct), "")
    if struct.__struct_fields__:
        yield from ("| field | packed as | meaning |", "|---|---|---|")
    for field in msgspec.structs.fields(struct):
        packed = packed_as(msgspec.inspect.type_info(field.type))
        if not field.required:
            packed += f"; `{msgspec.json.encode(default_of(field)).decode()}` if absent"
        yield f"| `{field.name}` | {packed} | {linked(docstrings.get(field.name, ''), struct)} |"


def linked(text: str, struct: type[msgspec.Struct]) -> str:
    """A docstring with links to the messages that it names."""
    module = inspect.getmodule(struct)

    def link(name: re.Match[str]) -> str:
        other = getattr(module, name[1], None)
        tag = other.__struct_config__.tag if isinstance(other, type(msgspec.Struct)) else None
        return f"[`{tag}`](#{tag})" if tag else f"`{name[1]}`"

    return re.sub(r"``?([^`]+)``?", link, text)


def alias_docstrings(struct: type[msgspec.Struct]) -> dict[str, str]:
    """For fields of a named type, the string that stands below the type in the struct's module."""
    module = inspect.getmodule(struct)
    assert module is not None
    texts = {
        name.id: " ".join(ast.literal_eval(text.value).replace("``", "`").split())
        for alias, text in itertools.pairwise(ast.parse(inspect.getsource(module)).body)
        if isinstance(alias, ast.Assign) and isinstance(text, ast.Expr)
        for name in alias.targets
        if isinstance(name, ast.Name)
    }
    (definition,) = ast.parse(inspect.getsource(struct)).body
    assert isinstance(definition, ast.ClassDef)
    annotations = {
        ast.unparse(field.target): ast.unparse(field.annotation)
        for field in definition.body
        if isinstance(field, ast.AnnAssign)
    }
    return {name: texts[annotation] for name, annotation in annotations.items() if annotation in texts}


def packed_as(info: Any) -> str:
    """How a value is packed, with its bounds."""
    kind = type(info).__name__.removesuffix("Type")
    if kind == "Union":
        alternatives = [packed_as(one) for one in info.types if type(one).__name__ != "NoneType"]
        return " or ".join(["null", *alternatives])
    if kind == "Struct":
        return f"map, [{info.cls.__name__}](#{info.cls.__name__.lower()})"
    if kind == "Literal":
        return "one of " + ", ".join(f"`{value}`" for value in info.values)
    if kind == "Enum":
        return "one of " + ", ".join(f"`{one.value}`" for one in info.cls)
    if kind in ("List", "VarTuple"):
        return f"array of {packed_as(info.item_type)}" + lengths(info)
    if kind == "Tuple":
        return "[" + ", ".join(packed_as(one) for one in info.item_types) + "]"
    words = {"Int": "integer", "Float": "float", "Str": "text", "Bytes": "binary", "Bool": "boolean"}
    return words[kind] + bounds(info) + lengths(info)


def lengths(info: Any) -> str:
    shortest, longest = getattr(info, "min_length", None), getattr(info, "max_length", None)
    unit = {"StrType": "characters", "BytesType": "bytes"}.get(type(info).__name__, "of them")
    if shortest is not None and shortest == longest:
        return f", {longest} {unit}"
    return f", at most {longest} {unit}" if longest is not None else ""


def value_of(annotation: object, name: str) -> str | None:
    """What may be written for a field; None for a nested struct, which has a table of its own."""
    if is_size(name):
        return "size"
    info = msgspec.inspect.type_info(annotation)
    if isinstance(info, msgspec.inspect.StructType):
        return None
    if isinstance(info, msgspec.inspect.UnionType):
        (alternative,) = (kind for kind in get_args(annotation) if kind is not type(None))
        return value_of(alternative, name) or "table"
    if isinstance(info, msgspec.inspect.LiteralType):
        return ", ".join(f"`{value}`" for value in info.values)
    if isinstance(info, msgspec.inspect.VarTupleType | msgspec.inspect.ListType):
        inner = info.item_type
        return "list of tables" if isinstance(inner, msgspec.inspect.DictType) else "list of text"
    if isinstance(info, msgspec.inspect.DictType):
        return "tables by name"
    return _WORDS[type(info).__name__.removesuffix("Type").lower()] + bounds(info)


def signature(function_path: str) -> Iterator[str]:
    """A function's signature and docstring."""
    function = imported(function_path)
    (definition,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.body = [], [ast.Expr(ast.Constant(...))]
    yield from ("```python", ast.unparse(definition), "```", "", inspect.getdoc(function) or "")


def checks_tables(_: str) -> Iterator[str]:
    """The conformance kit's checks by group. Read, not imported: the kit needs pytest."""
    for path in sorted((Path(connector.__path__[0]) / "testing").glob("*.py")):
        for group in ast.parse(path.read_text()).body:
            if isinstance(group, ast.ClassDef) and group.name.endswith("Checks"):
                yield from ("", f"**{ast.get_docstring(group)}**", "", "| check | what |", "|---|---|")
                for check in group.body:
                    if isinstance(check, ast.FunctionDef) and check.name.startswith("test_"):
                        text = " ".join((ast.get_docstring(check) or "").replace("``", "`").split())
                        yield f"| `{check.name.removeprefix('test_')}` | {text} |"


def bounds(info: object) -> str:
    signs = (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))
    limits = [(words, getattr(info, sign, None)) for sign, words in signs]
    return "".join(f", {words} {limit}" for words, limit in limits if limit is not None)


def shown(value: object, name: str) -> str:
    if is_size(name) and isinstance(value, int):
        return format_bytes(value)
    return msgspec.json.encode(value).decode() if not is_secret(name) else '""'


GENERATORS: dict[str, Callable[[str], Iterator[str]]] = {
    "checks": checks_tables,
    "fields": fields_table,
    "message": message_table,
    "metrics": metrics_table,
    "signature": signature,
}


def on_page_markdown(markdown: str, **_: object) -> str:
    return _MARKER.sub(lambda marker: "\n".join(GENERATORS[marker[1]](marker[2] or "")), markdown)
