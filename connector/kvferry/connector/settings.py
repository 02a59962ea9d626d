"""Where the configuration comes from, and which source every value was taken from.

Sources, the first that names a value wins: the engine's extra config, a TOML file, ``KVFERRY_*``
variables, the defaults. Every source is checked in full, also where another one overrides it.

Pure functions; only ``load_settings`` reads a file.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from kvferry.connector.config import Config, TierConfig
from kvferry.connector.errors import ConfigError
from kvferry.connector.memory import format_bytes
from kvferry.connector.schema import decode, is_secret, is_size, struct_of, unknown_key
from kvferry.connector.service import HOST
from kvferry.connector.tier import TierType

__all__ = ["Setting", "Settings", "effective", "load_settings", "split_tier", "typed_options"]

CONFIG_FILE_KEY = "config_file"
"""Key of the extra config that names the TOML file."""
CONFIG_FILE_VARIABLE = "KVFERRY_CONFIG"
PREFIX = "KVFERRY_"
DEFAULT = "default"
MASK = "********"
_ABSENT = object()
_URL_PASSWORD = re.compile(r"(://[^/@\s:]*:)[^/@\s]+@")

_TIER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_KUBERNETES = re.compile(r"KVFERRY_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_\w+)?)", re.ASCII)
"""Variables Kubernetes sets by itself beside a service called ``kvferry``; none of our business."""


class Settings(msgspec.Struct, frozen=True):
    """The effective configuration and the source of every value."""

    config: Config
    origins: Mapping[str, str]
    """Dotted path of each field to its source: ``kv_connector_extra_config``, a file's path, a
    variable's name, or ``default``."""


class Setting(NamedTuple):
    """One line of the effective configuration, fit to be shown."""

    path: str
    value: str
    """JSON, sizes also for people; masked where it is secret."""
    origin: str


class _Source(NamedTuple):
    """One place values come from: nested plain data, and what to call the source of a path."""

    values: Mapping[str, object]
    name: str
    variables: Mapping[str, str] = {}
    """For environment variables, the variable of each path."""

    def origin(self, path: str) -> str:
        return self.variables.get(path, self.name)


def load_settings(
    extra: Mapping[str, object] | None = None,
    toml_path: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read every source and return the effective configuration.

    Args:
        extra: The engine's ``kv_connector_extra_config``. Its key ``config_file`` names the TOML file.
        toml_path: The TOML file, where the command line names it; else the extra config's key, else
            ``KVFERRY_CONFIG``.
        environ: Environment variables; none when omitted.

    Returns:
        The configuration. Options of tiers are passed on unchecked: only their plugins know them,
        see :func:`typed_options`.

    Raises:
        ConfigError: A source cannot be read, or something in it is unknown, of the wrong type or out
            of range.
    """
    given = dict(extra or {})
    variables = environ or {}
    named = given.pop(CONFIG_FILE_KEY, None)
    if named is not None and not isinstance(named, str):
        raise ConfigError(CONFIG_FILE_KEY, f"found {named!r}, expected the path of a TOML file")
    path = toml_path or named or variables.get(CONFIG_FILE_VARIABLE)
    sources = [_Source(given, "kv_connector_extra_config")]
    if path:
        sources.append(_Source(_read_toml(path), path))
    sources.append(_from_environ(variables))
    for source in sources:
        _check(source)
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for field_path in _field_paths(Config):
        origins[field_path] = _take(field_path, sources, values)
    config = decode(Config, values)
    _check_names(config)
    return Settings(config, origins)


def effective(settings: Settings) -> Iterator[Setting]:
    """Yield the effective configuration field by field, tiers last, secrets masked."""
    for path, origin in settings.origins.items():
        if path != "tiers":
            yield Setting(path, _shown(path, _lookup(msgspec.to_builtins(settings.config), path)), origin)
    for index, tier in enumerate(settings.config.tiers):
        for name, value in tier.items():
            yield Setting(f"tiers[{index}].{name}", _shown(name, value), settings.origins["tiers"])


def split_tier(tier: Mapping[str, object], path: str = "tier") -> tuple[TierConfig, dict[str, object]]:
    """Split an element of ``tiers`` into kvferry's own fields and the options of the tier's plugin.

    Args:
        tier: The element as it was read.
        path: Where it stands (``tiers[0]``).

    Raises:
        ConfigError: One of kvferry's own fields is missing or wrong. The options are not checked.
    """
    own = {field.name for field in msgspec.structs.fields(TierConfig)}
    config = decode(TierConfig, {name: value for name, value in tier.items() if name in own}, path)
    if not config.name:
        config = msgspec.structs.replace(config, name=config.type)
    return config, {name: value for name, value in tier.items() if name not in own}


def typed_options(tier_type: TierType, options: Mapping[str, object], path: str) -> msgspec.Struct:
    """Turn a tier's options into the struct that its plugin declared.

    Args:
        tier_type: The kind of tier.
        options: What :func:`split_tier` left over.
        path: Where the tier stands (``tiers[0]``).

    Raises:
        ConfigError: Unknown key (the nearest valid one is named), missing key, wrong type or range.
    """
    own = [field.name for field in msgspec.structs.fields(TierConfig)]
    return decode(tier_type.options, options, path, others=own)


def _read_toml(path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(CONFIG_FILE_KEY, f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(CONFIG_FILE_KEY, f"{path} is not valid TOML: {error}") from error


def _from_environ(environ: Mapping[str, str]) -> _Source:
    """Nest ``KVFERRY_HOST__CAPACITY`` below ``host``, reading each text as its field's type wants it."""
    known = {PREFIX + path.upper().replace(".", "__"): path for path in _field_paths(Config)}
    values: dict[str, object] = {}
    variables: dict[str, str] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == CONFIG_FILE_VARIABLE or _KUBERNETES.fullmatch(name):
            continue
        if name not in known:
            raise unknown_key("", name, [*known, CONFIG_FILE_VARIABLE])
        _put(values, known[name], _from_text(environ[name], known[name]))
        variables[known[name]] = name
    return _Source(values, "environment", variables)


def _from_text(text: str, path: str) -> object:
    """Read a variable: text stays text, everything else is JSON; lists of names may use commas."""
    default = _lookup(msgspec.to_builtins(Config()), path)
    if isinstance(default, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        is_list = isinstance(default, tuple | list) and not text.lstrip().startswith(("[", "{"))
        return [part.strip() for part in text.split(",") if part.strip()] if is_list else text


def _check(source: _Source) -> None:
    """Decode one source alone, so that a mistake is reported even where another source overrides it."""
    try:
        config = decode(Config, source.values)
        for index, tier in enumerate(config.tiers):
            split_tier(tier, f"tiers[{index}]")
    except ConfigError as error:
        origin = source.origin(error.path.partition("[")[0])
        raise ConfigError(error.path, f"{error.why} [from {origin}]", error.hint) from None


def _check_names(config: Config) -> None:
    seen: set[str] = set()
    for index, tier in enumerate(config.tiers):
        name = split_tier(tier, f"tiers[{index}]")[0].name
        path = f"tiers[{index}].name"
        if not _TIER_NAME.fullmatch(name):
            raise ConfigError(path, f"found {name!r}", "use letters, digits, '_', '-' and '.', at most 64")
        if name == HOST or name in seen:
            raise ConfigError(path, f"{name!r} is taken", "give each tier a name of its own")
        seen.add(name)


def _take(path: str, sources: list[_Source], values: dict[str, object]) -> str:
    """Copy the value of ``path`` from the first source that has it; return that source's name."""
    for source in sources:
        value = _lookup(source.values, path, _ABSENT)
        if value is not _ABSENT:
            _put(values, path, value)
            return source.origin(path)
    return DEFAULT


def _field_paths(struct_type: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct_type):
        nested = struct_of(field.type)
        if nested is not None:
            yield from _field_paths(nested, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _lookup(values: object, path: str, default: object = None) -> object:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _put(values: dict[str, object], path: str, value: object) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        assert isinstance(inner, dict)  # fields of one schema: a parent is never a leaf
        values = inner
    values[name] = value


def _shown(path: str, value: object) -> str:
    name = path.rpartition(".")[2]
    if is_secret(name):
        return MASK if value else '""'
    if is_size(name) and isinstance(value, int):
        return f"{value} ({format_bytes(value)})"
    return json.dumps(_masked(value))


def _masked(value: object) -> object:
    if isinstance(value, Mapping):
        return {
            name: MASK if is_secret(str(name)) and inner else _masked(inner) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(inner) for inner in value]
    return _URL_PASSWORD.sub(rf"\1{MASK}@", value) if isinstance(value, str) else value
