"""Strict decoding of plain data into msgspec structs, with messages an operator can act on.

msgspec knows the types and their bounds; this module adds what a configuration needs: the dotted path
of every mistake, the nearest valid key for an unknown one, sizes such as ``"64GiB"``, and which fields
are secret. Two naming rules replace annotations: a field called ``capacity`` or ending in ``_bytes`` is a
size, a field whose name has a word such as ``secret`` or ``token`` in it is never shown.

Pure functions.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec

from kvferry.connector.errors import ConfigError

__all__ = [
    "MASK",
    "decode",
    "is_name",
    "is_secret",
    "is_size",
    "masked",
    "nearest",
    "parse_size",
    "struct_of",
    "unknown_key",
]

S = TypeVar("S", bound=msgspec.Struct)

MASK = "********"
"""In place of a secret."""
_URL_PASSWORD = re.compile(r"(://[^/@\s:]*:)[^/@\s]+@")
_UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgtp", start=1)
    for name, base in ((f"{letter}ib", 1024), (f"{letter}b", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_MAX_SIZE = 1 << 60
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_SIZE_HINT = 'write a number of bytes or a size such as "64GiB" or "512 MiB"'
_SECRET_WORDS = frozenset({"secret", "password", "passwd", "token", "credential", "credentials", "apikey"})

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
"""What msgspec's names for types are called in front of an operator."""


def is_name(name: object) -> bool:
    """Tell whether a tier, or what a plugin offers, may be called ``name``."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_size(name: str) -> bool:
    """Tell whether a field of this name holds bytes and may be written as a size."""
    return name == "capacity" or name.endswith(("_capacity", "_bytes"))


def is_secret(name: str) -> bool:
    """Tell whether the value of a field of this name must not be shown."""
    words = name.lower().replace("-", "_").split("_")
    return not _SECRET_WORDS.isdisjoint(words) or name.lower().endswith(
        ("access_key", "api_key", "private_key")
    )


def parse_size(value: object, path: str) -> int:
    """Return a size in bytes.

    Args:
        value: A positive whole number, or text with a unit: KiB, MiB, GiB, TiB, PiB (1024) or
            kB, MB, GB, TB, PB (1000).
        path: Where it stands, for the message.

    Raises:
        ConfigError: It is no size, or not a positive one.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(path, f"found {_shown(value)}, expected a size", _SIZE_HINT)
    if isinstance(value, int):
        count = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(path, f"found {_shown(value)}, expected a size", _SIZE_HINT)
        count = round(float(match[1]) * _UNITS[match[2].lower()])
    if not 0 < count <= _MAX_SIZE:
        raise ConfigError(
            path, f"found {_shown(value)}, a size must be positive and at most 1024 PiB", _SIZE_HINT
        )
    return count


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that ``name`` was probably meant to be, or None."""
    by_folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


def unknown_key(path: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that does not exist, naming the nearest one that does."""
    names = sorted(known)
    guess = nearest(name, names)
    hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(names) or 'none'}"
    return ConfigError(_join(path, name), "unknown key", hint)


def struct_of(type_: object) -> type[msgspec.Struct] | None:
    """Return the struct class that a field's type is, or may be beside None; else None."""
    is_union = get_origin(type_) in (Union, types.UnionType)
    for alternative in get_args(type_) if is_union else (type_,):
        if isinstance(alternative, type) and issubclass(alternative, msgspec.Struct):
            return alternative
    return None


def masked(value: object) -> object:
    """Return plain data with every secret in it replaced."""
    if isinstance(value, Mapping):
        return {
            name: MASK if is_secret(str(name)) and inner else masked(inner) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return _URL_PASSWORD.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value


def decode(struct_type: type[S], raw: object, path: str = "", others: Iterable[str] = ()) -> S:
    """Turn a mapping into ``struct_type``, refusing whatever does not fit.

    Args:
        struct_type: The schema.
        raw: What was read from JSON, TOML or the engine.
        path: Dotted path of ``raw`` itself, for messages.
        others: Keys that are valid beside ``raw`` though not part of it, to guess unknown ones.

    Raises:
        ConfigError: Unknown key, missing key, wrong type, or a value out of its range.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(path or "configuration", f"found {_shown(raw)}, expected a table of settings")
    fields = {field.name: field for field in msgspec.structs.fields(struct_type)}
    values: dict[str, object] = {}
    for name, value in raw.items():
        if name not in fields:
            raise unknown_key(path, str(name), [*fields, *others])
        values[name] = _value(name, fields[name].type, value, _join(path, name))
    for field in fields.values():
        if field.required and field.name not in values:
            raise ConfigError(_join(path, field.name), "is required and was not given")
    try:
        return struct_type(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(path or "configuration", str(error)) from error


def _value(name: str, type_: Any, raw: object, path: str) -> object:
    nested = struct_of(type_)
    if nested is not None and not (raw is None and type(None) in get_args(type_)):
        return decode(nested, raw, path)
    if is_size(name) and raw is not None:
        raw = parse_size(raw, path)
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ConfigError(path, f"found {raw}, expected a finite number")
    try:
        return msgspec.convert(raw, type_, strict=True)
    except msgspec.ValidationError as error:
        found = "a value (not shown)" if is_secret(name) else _shown(raw)
        raise ConfigError(path, f"found {found}, expected {_expected(type_, error)}") from None


def _expected(type_: Any, error: msgspec.ValidationError) -> str:
    """Say what would have been right: the alternatives of a Literal, else msgspec's own words."""
    if str(get_origin(type_)) == "typing.Literal":
        return " or ".join(repr(value) for value in get_args(type_))
    text = str(error).replace("`", "").removeprefix("Expected ").partition(", got")[0]
    return re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), text)


def _shown(value: object) -> str:
    text = repr(masked(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
